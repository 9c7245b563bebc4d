"""The MMDiT: text and video have weights of their own and meet in Mixture of Contexts."""

from moc_jax.models.mmdit.model import MMDiT

__all__ = ["MMDiT"]
