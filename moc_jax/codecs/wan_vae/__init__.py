"""Wan's autoencoders as a codec."""

from moc_jax.codecs.wan_vae.codec import WanVae, described

__all__ = ["WanVae", "described"]
