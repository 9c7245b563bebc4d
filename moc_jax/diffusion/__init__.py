"""Rectified flow as pure functions over a velocity: the process, its solvers, guidance and conditioning.

Nothing here knows a model. A velocity function maps latents z `[B, F, Y, X, Z]` and the noise level t `[B, S]` of each
shot to the velocity `[B, F, Y, X, Z]`; t = 1 is pure noise, t = 0 is video.
"""
