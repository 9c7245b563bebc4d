"""Storyboard -> video: scenes to sample, the sampler, and pictures of what came out."""
