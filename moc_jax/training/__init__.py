"""Training: the state and how it is updated (state, optimizer, step), and the run around it (loop, metrics)."""
