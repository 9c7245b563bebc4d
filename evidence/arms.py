"""What is compared: equal weights, data, text and updates; only what a query may read differs.

In all arms but those with "all captions", a shot's video reads no caption but its own and the global one, and captions
read no video. So nothing but video of earlier shots can tell how a character looks.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import jax

from evidence.dense import dense_attention
from evidence.masked import MOST, masked_attention
from moc_jax.attention.api import RoutedAttention, SceneAttention
from moc_jax.config import ChunkConfig, ConfigError, MoCConfig
from moc_jax.scene import GLOBAL


def text_apart(attention: SceneAttention) -> SceneAttention:
    """As `attention`, but captions read themselves and the global caption alone.

    With the library's own, which read their shot's video and each other, looks would pass from shot to shot through
    text: by three layers even where no video is picked.
    """

    def attend(q, k, v, table, cfg, *, key=None):
        out, routes = attention(q, k, v, table, cfg, key=key)
        shot = table.token_shot[:, : table.text_tokens]
        mask = (shot[:, :, None] == shot[:, None, :]) | (shot == GLOBAL)[:, None, :]
        text = jax.nn.dot_product_attention(*(x[:, : table.text_tokens] for x in (q, k, v)), mask=mask[:, None])
        return out.at[:, : table.text_tokens].set(text), routes

    return attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to attend."""

    moc: MoCConfig
    attention: SceneAttention
    captions_apart: bool
    """Whether captions read themselves and the global one alone."""
    every_chunk: bool = False
    """Whether `attention` is dense whatever `moc` picks, which then stands for the counts alone."""


_PICKING = re.compile(r"(moc|random|recent) (\d+)x(\d+)")
_ROUTING: dict[str, Literal["keys", "random", "recent"]] = {"moc": "keys", "random": "random", "recent": "recent"}
_SHRINKING = "shrinking chunks"
_CHANGES: dict[str, Callable[[MoCConfig], MoCConfig]] = {
    "no drop-off or drop-in": lambda moc: dataclasses.replace(moc, drop_off_max=0.0, max_drop_in=0),
    "first frame": lambda moc: dataclasses.replace(moc, sink_chunks=-(-_FRAME // moc.chunk.size)),
    "two descriptors": lambda moc: dataclasses.replace(moc, descriptors=2),
    "no self anchor": lambda moc: dataclasses.replace(moc, self_anchor="none", causal_routing=False),
    "past": lambda moc: dataclasses.replace(moc, visibility="past"),
    "all captions": lambda moc: dataclasses.replace(moc, text_anchor="all"),
    _SHRINKING: lambda moc: moc,  # in the end; see `stages_of`
}
_ALL = 2**20  # picks
_FRAME = 16  # tokens of a latent frame, in all worlds but the small one and the long ones


def arm_of(name: str, backend: str = "auto") -> Arm:
    """The arm of a name: "dense", "own shot", or what picks, chunk in tokens x picks; then what is changed: "moc 8x6",
    "random 8x6", "moc 8x12, no self anchor". With "all captions" these read video and are read by all, as the library
    has it.

    Raises:
        ConfigError: there is no such arm.
    """
    base, *changes = name.split(", ")
    found = _PICKING.fullmatch(base)
    shrinks = _SHRINKING in changes
    if not (found or (base in ("dense", "own shot") and not shrinks)) or not set(changes) <= set(_CHANGES):
        raise ConfigError(
            f"no arm is named {name!r}; there are dense, own shot, and moc, random or recent with a chunk's tokens "
            f"and picks, as in 'moc 8x6', and after it{' or'.join(f' ", {how}"' for how in _CHANGES)}"
        )
    size, top_k = (int(found[2]), int(found[3])) if found else (8, _ALL if base == "dense" else 0)
    moc = MoCConfig(
        chunk=ChunkConfig(unit="tokens", size=size),
        top_k=top_k,
        routing=_ROUTING[found[1]] if found else "keys",
        causal_routing=base != "dense",
        text_anchor="own+global",
    )
    for change in changes:
        moc = _CHANGES[change](moc)
    apart, every = moc.text_anchor == "own+global", base == "dense"
    if every and not apart:
        moc, every = dataclasses.replace(moc, mode="dense"), False
    attention = dense_attention(backend) if every else RoutedAttention(backend=backend)
    attention = text_apart(attention) if apart else attention
    if backend == "auto":
        attention = _by_size(masked_attention(every_chunk=every, captions_apart=apart), attention)
    return Arm(moc=moc, attention=attention, captions_apart=apart, every_chunk=every)


def stages_of(name: str) -> list[tuple[float, str]]:
    """From which share of its updates on an arm is trained as which; in the end as itself. Only chunks that shrink are
    others before: four times as large in the first third, and twice in the second."""
    base, *changes = name.split(", ")
    if _SHRINKING not in changes:
        return [(0.0, name)]
    at = _PICKING.fullmatch(base)
    assert at is not None  # `arm_of` refuses others
    others = [change for change in changes if change != _SHRINKING]
    larger = (", ".join([f"{at[1]} {times * int(at[2])}x{at[3]}", *others]) for times in (4, 2))
    return [*zip((0.0, 1 / 3), larger), (2 / 3, name)]


def _by_size(small: SceneAttention, large: SceneAttention) -> SceneAttention:
    def attend(q, k, v, table, cfg, *, key=None):
        return (small if q.shape[1] <= MOST else large)(q, k, v, table, cfg, key=key)

    return attend


ARMS = (
    "dense",
    "own shot",
    "moc 8x6",
    "moc 16x3",
    "moc 8x3",
    "moc 4x6",
    "random 8x6",
    "random 8x3",
    "recent 8x6",
    "moc 8x6, no drop-off or drop-in",
    "moc 8x12, no self anchor",
    "moc 8x6, all captions",
    "own shot, all captions",
    "moc 8x6, first frame",
    "moc 8x6, two descriptors",
    "moc 8x6, shrinking chunks",
)
"""Those of the evidence."""
