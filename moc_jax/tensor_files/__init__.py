"""Public files of named tensors, read in place: where they lie, what is in them, and what is wrong with them."""
