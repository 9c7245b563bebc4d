"""What a sampled scene reads: which chunks its tokens pick, and how the picks of shots divide among shots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Int, Int32, typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picks:
    """What each token of a sampled scene reads."""

    levels: tuple[float, ...]
    """Noise levels that the sample was shown at."""
    routes: Int[np.ndarray, "T depth H V K"]
    """Chunks; -1 where a slot is empty."""
    shot: Int32[np.ndarray, " C"]
    start: Int32[np.ndarray, " C"]
    """First token of each chunk in the video."""
    length: Int32[np.ndarray, " C"]
    """Tokens; 0 for captions and padding."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of tokens."""


@typed
def routing_shares(
    routes: Int[Array, "depth B H V K"], table: ChunkTable, shots: int
) -> Float[Array, "depth B {shots} {shots}"]:
    """Share of the picks of each shot's tokens that lie in each shot; see `Sampler.routing`."""

    def count(routes, chunk_shot, query_shot):  # [H, V, K], [C], [V]
        picked = jnp.where(routes >= 0, chunk_shot[jnp.maximum(routes, 0)], -1)
        row = jnp.broadcast_to(query_shot[None, :, None], routes.shape)
        counted = (picked >= 0) & (row >= 0)
        return jnp.zeros((shots, shots)).at[jnp.where(counted, row, shots), picked].add(1, mode="drop")

    of_batch = jax.vmap(count, in_axes=(0, 0, 0))
    counts = jax.vmap(of_batch, in_axes=(0, None, None))(routes, table.shot, table.token_shot[:, table.text_tokens :])
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
