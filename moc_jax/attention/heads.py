"""Groups of heads: layout.py has them."""

from moc_jax.attention.layout import Heads, head_groups

__all__ = ["Heads", "head_groups"]
