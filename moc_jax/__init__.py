"""Mixture of Contexts for long multi-shot video generation (arXiv 2508.21058), in JAX."""
