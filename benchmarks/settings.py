"""The scenes that attention is measured on, by name."""

import dataclasses
import math

import jax.numpy as jnp

from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import ChunkTable, SceneLengths, SceneShape, chunk_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quoted:
    """Somebody else's figures, measured elsewhere: for comparison, never counted as measured."""

    what: str
    forward_ms: float
    forward_backward_ms: float
    heads: int = 12
    head_dim: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Equal shots and captions, and the attention over them. No padding, so dense attention computes the same task."""

    moc: MoCConfig
    shots: int = 1
    frames: int = 1  # per shot
    frame_tokens: int
    caption: int = 0  # tokens of each caption, the global one included
    quoted: Quoted | None = None

    @property
    def shape(self) -> SceneShape:
        """The scene's sizes, nothing padded."""
        return SceneShape(
            shots=self.shots,
            frames=self.shots * self.frames,
            rows=1,
            columns=self.frame_tokens,
            text_tokens=(self.shots + 1) * self.caption,
        )

    def table(self) -> ChunkTable:
        """The chunk table of one such scene."""
        lengths = SceneLengths(
            shot_frames=jnp.full((1, self.shots), self.frames), text_lengths=jnp.full((1, self.shots + 1), self.caption)
        )
        return chunk_table(lengths, self.shape, self.moc.chunk)

    def shrunk(self, factor: int) -> "Setting":
        """The same with `factor` times fewer tokens per frame, caption and chunk, which nobody measured elsewhere."""
        if factor == 1:
            return self
        chunk = self.moc.chunk
        if chunk.unit == "tokens":
            chunk = dataclasses.replace(chunk, size=max(1, chunk.size // factor))
        return dataclasses.replace(
            self,
            moc=dataclasses.replace(self.moc, chunk=chunk),
            frame_tokens=max(1, self.frame_tokens // factor),
            caption=math.ceil(self.caption / factor),
            quoted=None,
        )


def multi_shot(shots: int) -> Setting:
    """Shots of 8 seconds at 480x480 and 12 frames/s with a caption each (configs/multi_shot.py)."""
    moc = MoCConfig(chunk=ChunkConfig(size=1280), top_k=5)
    return Setting(moc=moc, shots=shots, frames=25, frame_tokens=900, caption=56)


def _routed(tokens: int, chunk: int, top_k: int, forward_ms: float, forward_backward_ms: float) -> Setting:
    """The routed part alone: no anchor of any kind, every chunk a candidate, a short last chunk."""
    moc = MoCConfig(
        chunk=ChunkConfig(size=chunk, remainder="tail"),
        top_k=top_k,
        self_anchor="none",
        text_anchor="none",
        causal_routing=False,
    )
    quoted = Quoted(what="FlashMoBA on one NVIDIA H200", forward_ms=forward_ms, forward_backward_ms=forward_backward_ms)
    return Setting(moc=moc, frame_tokens=tokens, quoted=quoted)


SETTINGS = {
    "multi_shot": multi_shot(8),
    "routed_1280_k5": _routed(184_320, 1280, 5, 69.6, 155.0),
    "routed_512_k8": _routed(184_320, 512, 8, 99.8, 156.0),
    "routed_1536_k3": _routed(32_704, 1536, 3, 6.2, 17.3),
    "routed_256_k3": _routed(6_144, 256, 3, 1.4, 2.0),
    "short_shots": Setting(
        moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=5),
        shots=20,
        frames=4,
        frame_tokens=900,
        caption=56,
    ),
    "wan": Setting(
        moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=3, self_anchor="chunk", causal_routing=False),
        frames=21,
        frame_tokens=1560,
    ),
    "single_shot": Setting(
        moc=MoCConfig(chunk=ChunkConfig(size=256), top_k=3, self_anchor="chunk", causal_routing=False),
        frames=25,
        frame_tokens=240,
        caption=152,
    ),
}
SCALING_SHOTS = (1, 2, 4, 8, 16, 32, 64)
