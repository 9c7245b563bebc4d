"""The transformer of Wan 2.1 and 2.2: video attends to itself by Mixture of Contexts, and reads captions apart."""

from moc_jax.models.wan.model import WanDiT

__all__ = ["WanDiT"]
