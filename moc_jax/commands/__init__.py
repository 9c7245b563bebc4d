"""The programs `moc-train` and `moc-sample`, which `moc_jax.cli` starts."""
