"""Mixture of Contexts for long multi-shot video generation (arXiv 2508.21058), in JAX."""

import sys

__version__ = "0.1.0"  # the only place: pyproject.toml reads it here, and a clone needs no installation

if sys.argv[:1] == ["-m"]:  # python -m moc_jax.<module>, before its own imports, which may fail too
    from moc_jax.cli import report_errors

    report_errors()
