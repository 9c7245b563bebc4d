"""umT5's encoder, which Wan reads captions by."""

from moc_jax.text.umt5.captions import Umt5, described

__all__ = ["Umt5", "described"]
