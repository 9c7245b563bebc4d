"""Mixture of Contexts for long multi-shot video generation (arXiv 2508.21058), in JAX."""

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here, and a clone needs no installation
