"""Which tensors files of umT5's encoder hold, by transformers' names and by the Wan team's; shapes are the same."""

import dataclasses
import re
from collections.abc import Mapping

from moc_jax.config import ConfigError
from moc_jax.showing import Shapes, contradictions
from moc_jax.tensor_files.beside import Wanted
from moc_jax.text.umt5.encoder import BUCKETS

LICENCE = "Apache-2.0 for what Google published as umT5 and the Wan team with Wan; what others trained has their own"

_AROUND = {
    "table": ("shared.weight", "token_embedding.weight"),
    "norm": ("encoder.final_layer_norm.weight", "norm.weight"),
}
_MOST_LAYERS = 2**12  # that a config.json may ask for
_TIED = "encoder.embed_tokens.weight"  # the table again; a file has either name, or both
_ATTENTION, _MLP = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
_IN_LAYER = {
    **{x: (f"{_ATTENTION}.SelfAttention.{x}.weight", f"blocks.{{}}.attn.{x}.weight") for x in "qkvo"},
    "bias": (
        f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
        "blocks.{}.pos_embedding.embedding.weight",
    ),
    "norm1": (f"{_ATTENTION}.layer_norm.weight", "blocks.{}.norm1.weight"),
    "wi_0": (f"{_MLP}.DenseReluDense.wi_0.weight", "blocks.{}.ffn.gate.0.weight"),
    "wi_1": (f"{_MLP}.DenseReluDense.wi_1.weight", "blocks.{}.ffn.fc1.weight"),
    "wo": (f"{_MLP}.DenseReluDense.wo.weight", "blocks.{}.ffn.fc2.weight"),
    "norm2": (f"{_MLP}.layer_norm.weight", "blocks.{}.norm2.weight"),
}
PARTS = tuple(_IN_LAYER)
"""Of a layer; `layer_name` says what its tensors are called."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What weights' shapes say of an encoder."""

    vocabulary: int
    dim: int
    heads: int
    inner: int
    """Of all heads together."""
    mlp_dim: int
    depth: int


def layer_name(number: int, part: str) -> str:
    """What the package calls a layer's tensor."""
    return f"{number}.{part}"


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """By the package's names."""
    m, n, f = sizes.dim, sizes.inner, sizes.mlp_dim
    parts = {"q": (n, m), "k": (n, m), "v": (n, m), "o": (m, n), "bias": (BUCKETS, sizes.heads), "norm1": (m,)}
    parts |= {"wi_0": (f, m), "wi_1": (f, m), "wo": (m, f), "norm2": (m,)}
    layers = {layer_name(i, part): shape for i in range(sizes.depth) for part, shape in parts.items()}
    return {"table": (sizes.vocabulary, m), "norm": (m,), **layers}


def public_name(name: str, spelling: int) -> str:
    """What transformers (0) or the Wan team (1) call a tensor of the package."""
    number, dot, part = name.partition(".")
    return _IN_LAYER[part][spelling].format(number) if dot else _AROUND[name][spelling]


def recognised(shapes: Shapes, settings: Mapping[str, object], where: str) -> tuple[Sizes, Wanted, list[str]]:
    """The encoder that some tensors are of; by the names that the file must have, the package's, and shapes; and what
    its config.json says of it that isn't so. Beside the Wan team's file lies the transformer's.

    Raises:
        ConfigError: they are of something else.
    """
    spelling = 1 if _AROUND["table"][1] in shapes else 0
    tied = spelling == 0 and _TIED in shapes
    table = shapes.get(_TIED if tied else _AROUND["table"][spelling], ())
    first = {part: shapes.get(public_name(layer_name(0, part), spelling), ()) for part in ("q", "bias", "wi_0")}
    if any(len(shape) != 2 for shape in (table, *first.values())):
        few = ", ".join(sorted(shapes)[:3])
        raise ConfigError(f"{where} isn't an encoder of umT5: its {len(shapes)} tensors are others (it has {few})")
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"(?:encoder\.block|blocks)\.(\d+)\.", name))]
    if spelling or settings.keys() & {"_class_name", "dim"}:
        settings = {}  # of what lies beside it: transformers' have no such fields
    layers = settings.get("num_layers")
    depth = 1 + max(blocks)
    sizes = Sizes(
        vocabulary=table[0],
        dim=table[1],
        heads=first["bias"][1],
        inner=first["q"][0],
        mlp_dim=first["wi_0"][0],
        depth=max(depth, layers) if isinstance(layers, int) and layers <= _MOST_LAYERS else depth,
    )
    said = {
        "num_layers": depth,
        "d_model": sizes.dim,
        "num_heads": sizes.heads,
        "d_kv": sizes.inner // max(sizes.heads, 1),
        "d_ff": sizes.mlp_dim,
        "vocab_size": sizes.vocabulary,
        "relative_attention_num_buckets": BUCKETS,
    }
    wanted = {public_name(name, spelling): (name, shape) for name, shape in shapes_of(sizes).items()}
    if tied:
        wanted[_TIED] = "table", table
    if tied and _AROUND["table"][0] not in shapes:
        del wanted[_AROUND["table"][0]]
    return sizes, wanted, contradictions(settings, said)
