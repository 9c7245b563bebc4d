"""Attention of some shots of a scene that reads the shots before them where they are kept (`visibility = past`).

No shot sees a later one, so once one is finished its keys and values never change, and neither do the means by which
its chunks are picked. They are kept for each layer, and queries are those of the given shots alone:

    routes    top-k over all chunks of the scene, by their kept or their new means
    anchors   new video, and all captions: kept ones with the new ones in their place
    picks     kept video, and new video where that can be picked
    out       one softmax over all of these: parts over keys that have nothing in common, merged (parts.py)

The chunks are numbered as in the whole scene, so that routes, ties and orders are those of the whole. For Hopper's
kernels the rows of all layers are one array, of which a table of chunks says where a layer's lie: nothing is copied.
Other backends take a layer's out.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.api import RoutedAttention, fitting, route_by, within
from moc_jax.attention.backends import Backend, implementation
from moc_jax.attention.deal import Deal
from moc_jax.attention.kept import Kept, Rows, specs_of
from moc_jax.attention.layout import Queries, queries_of
from moc_jax.attention.links import Links
from moc_jax.attention.pallas_gpu.device import Hopper
from moc_jax.attention.sharded import QKV, OverMesh
from moc_jax.attention.statistics import merge
from moc_jax.config import MoCConfig
from moc_jax.scene import GLOBAL, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Float, Float32, Int, typed
from moc_jax.sharding import RULES, divided


class New(NamedTuple):
    """Keys and values that a layer computed of the given tokens, text and then video, and its descriptors."""

    k: Float[Array, "X B n H D"]
    v: Float[Array, "X B n H D"]
    phi: Float32[Array, "X B H C D"]


class Seen(NamedTuple):
    """What a layer read and computed, as far as it is asked for."""

    routes: Int[Array, "B H Q K"] | None = None
    new: New | None = None
    means: Float32[Array, "B 2 P H D"] | None = None
    """Of queries and of keys, by shot."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """Which tokens of a scene are given: the global caption and those of some shots that follow each other, then these
    shots' video."""

    table: ChunkTable  # the whole scene's
    token: Int[Array, "B n"]  # of the whole scene, each given one; beyond it for padding
    tokens: Queries  # the given tokens as queries of the scene's chunks
    first: Int[Array, " B"]  # the first given shot
    end: Int[Array, " B"]  # and the shot behind the last
    text_tokens: int = dataclasses.field(metadata={"static": True})  # that are given
    shots: int = dataclasses.field(metadata={"static": True})  # given ones, at most

    @classmethod
    def of(
        cls,
        table: ChunkTable,
        token: Int[Array, "B n"],
        first: Int[Array, " B"],
        end: Int[Array, " B"],
        *,
        text_tokens: int,
        shots: int,
    ) -> "Given":
        """Such tokens of a scene; see the fields."""
        chunk_of = jax.vmap(functools.partial(jnp.take, mode="fill", fill_value=-1))(table.chunk_of, token)
        tokens = queries_of(table, chunk_of)
        tokens = dataclasses.replace(tokens, text_tokens=text_tokens, first_video=text_tokens)
        return cls(table, token, tokens, first, end, text_tokens, shots)

    @property
    def chunk_of(self) -> Int[Array, "B n"]:
        """The chunk of each given token; -1 for padding."""
        return self.tokens.chunk_of

    @property
    def new(self) -> Bool[Array, "B C"]:
        """Chunks whose tokens are given."""
        shot = self.table.shot
        return (shot == GLOBAL) | ((shot >= self.first[:, None]) & (shot < self.end[:, None]))

    @property
    def first_video(self) -> Int[Array, " B"]:
        """The first given token of video, among the scene's of video."""
        return self.token[:, self.text_tokens] - self.table.text_tokens

    def queries(self, row: Int[Array, " Q"] | None) -> Queries:
        """All given tokens, or those of such rows, as queries of the scene's chunks."""
        if row is None:
            return self.tokens
        return queries_of(self.table, self.chunk_of.at[:, row].get(mode="fill", fill_value=-1))

    @typed
    def in_text(self, new: Float[Array, "B n H D"], kept: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
        """All captions of the scene: the given ones' rows instead of kept ones'."""
        if kept.shape[1] == 0:
            return kept
        rows = self.text_tokens
        token = jnp.where(self.chunk_of[:, :rows] >= 0, self.token[:, :rows], kept.shape[1])
        return jax.vmap(lambda kept, at, new: kept.at[at].set(new, mode="drop"))(
            kept, token, new[:, :rows].astype(kept.dtype)
        )

    def keys(
        self, new: Float[Array, "B n H D"], kept: Float[Array, "1 B depth L H D"], index: Int[Array, ""]
    ) -> Float[Array, "B _ H D"]:
        """[all captions | given video] of keys or values in layer `index`."""
        text = self.in_text(new, lax.dynamic_index_in_dim(kept[0], index, 1, False))
        return jnp.concatenate([text.astype(new.dtype), new[:, self.text_tokens :]], axis=1)

    def new_keys(self) -> ChunkTable:
        """The scene's chunks in [all captions | given video]; those of other video are empty."""
        table = self.table
        text, video = table.kind == TEXT, self.new & (table.kind == VIDEO)
        chunk_of = jnp.concatenate(
            [table.chunk_of[:, : table.text_tokens], self.chunk_of[:, self.text_tokens :]], axis=1
        )
        return dataclasses.replace(
            table,
            start=jnp.where(video, table.start - self.first_video[:, None], jnp.where(text, table.start, 0)),
            length=jnp.where(text | video, table.length, 0),
            chunk_of=chunk_of,
        )

    def kept_keys(self, rows: int, layer: Int[Array, ""] | int = 0, layers: int = 1) -> ChunkTable:
        """The scene's chunks in kept video of so many rows, or of all layers; those of other tokens are empty."""
        table = self.table
        there = (table.kind == VIDEO) & (table.shot < self.first[:, None])
        if layers == 1:
            video = table.chunk_of[:, table.text_tokens :]
            seen = jnp.take_along_axis(there, jnp.maximum(video, 0), axis=1) & (video >= 0)
            chunk_of = jnp.pad(jnp.where(seen, video, -1), ((0, 0), (0, rows - video.shape[1])), constant_values=-1)
        else:
            chunk_of = jnp.full((len(there), layers * rows), -1, jnp.int32)  # which nobody looks at
        return dataclasses.replace(
            table,
            start=jnp.where(there, table.start - table.text_tokens + layer * rows, 0),
            length=jnp.where(there, table.length, 0),
            chunk_of=chunk_of,
            text_tokens=0,
        )


# ------------------------------------------------------------------------------------------------ one device's part


def continued(
    attention: RoutedAttention,
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B n H D"],
    v: Float[Array, "B n H D"],
    queries: Queries,
    given: Given,
    kept: Kept,
    index: Int[Array, ""],
    cfg: MoCConfig,
    *,
    with_phi: bool,
) -> tuple[Float[Array, "B Q H D"], Int[Array, "B H Q K"], Float32[Array, "B H C D"] | None]:
    """Outputs and routes of queries among the given tokens, in layer `index`; and phi of all chunks, new or kept.

    Args:
        k, v: Of the given tokens.
        with_phi: phi is asked for even where nothing is routed.
    """
    scene = given.table
    backend = attention.backend_for(q, k, v, scene, cfg)
    run, own = implementation(backend), given.new_keys()
    own_k, own_v = given.keys(k, kept.text_k, index), given.keys(v, kept.text_v, index)

    def phi():
        new = jnp.repeat(given.new, cfg.descriptors, axis=1)[:, None, :, None]
        old = lax.dynamic_index_in_dim(kept.phi[0], index, 1, False)
        return jnp.where(new, run.means(own_k, own, cfg, backend), old)

    found = phi() if with_phi else None
    routes = route_by(q, phi if found is None else lambda: found, queries, scene, cfg, backend)
    parts = [run.part(q, own_k, own_v, None, queries, own, cfg, backend)]
    old_k, old_v, old = _old_keys(given, kept, index, k.dtype, backend)
    picks, few = fitting(routes, scene), within(cfg, scene)
    if cfg.mode == "dense":
        parts.append(run.part(q, old_k, old_v, None, queries, old, cfg, backend))
    elif picks.shape[-1]:
        parts.append(run.part(q, old_k, old_v, _only(picks, old), queries, old, few, backend))
        if cfg.self_anchor != "shot" or given.shots > 1:
            parts.append(run.part(q, own_k, own_v, _only(picks, own), queries, own, few, backend))
    out = jnp.where(queries.valid[..., None, None], merge(*parts)[0], 0).astype(v.dtype)
    return out, routes, found


def _old_keys(
    given: Given, kept: Kept, index: Int[Array, ""], dtype: jnp.dtype, backend: Backend
) -> tuple[Array, Array, ChunkTable]:
    """Kept keys and values, and where the scene's chunks lie in them."""
    rows = kept.k.values.shape[2] // kept.depth
    if isinstance(backend, Hopper) and kept.k.scale is None:
        return kept.k.values[0], kept.v.values[0], given.kept_keys(rows, index, kept.depth)
    k, v = (x.layer(index, kept.depth, dtype) for x in (kept.k, kept.v))
    return k, v, given.kept_keys(rows)


def _only(routes: Int[Array, "B H Q K"], table: ChunkTable) -> Int[Array, "B H Q K"]:
    """The picks that have keys in a table."""
    length = jnp.take_along_axis(table.length[:, None, None], jnp.maximum(routes, 0), axis=3)
    return jnp.where(length > 0, routes, -1)


# ------------------------------------------------------------------------------------------------ over a mesh


class OverKept(NamedTuple):
    """Attention of given tokens, which lie as `deal` says, over these and what is kept."""

    attention: RoutedAttention
    given: Given
    kept: Kept
    cfg: MoCConfig
    deal: Deal
    with_routes: bool
    with_new: bool

    def __call__(
        self, text: QKV, video: QKV, index: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, "B _ H D"], Float[Array, "B _ H D"]], Seen]:
        """Outputs of text and video, where their q are, and what is asked for beside, in layer `index`."""
        mesh, batch = jax.sharding.get_abstract_mesh(), text[0].shape[0]
        if mesh.empty or mesh.size == 1:
            return self._local(text, video, self.given, self.kept, index)
        of_batch = divided(RULES.spec("batch"), batch, mesh)
        of_tokens = divided(RULES.spec("batch", "tokens", "heads", "head_dim"), batch, mesh)
        of_routes = divided(RULES.spec("batch", "heads", "table", "picks"), batch, mesh)
        scenes, heads = of_batch[0], RULES.spec("heads")[0]
        of_new = jax.P("context", scenes, None, heads)
        seen = Seen(
            of_routes if self.with_routes else None,  # pyrefly: ignore[bad-argument-type]
            New(of_new, of_new, jax.P("context", scenes, heads)) if self.with_new else None,  # pyrefly: ignore
        )
        over_mesh = jax.shard_map(
            self._local,
            in_specs=(of_tokens, of_tokens, of_batch, specs_of(self.kept, scenes), jax.P()),
            out_specs=((of_tokens, of_tokens), seen),
            check_vma=False,
        )
        return over_mesh(text, video, self.given, self.kept, index)

    def _local(self, text: QKV, video: QKV, given: Given, kept: Kept, index: Int[Array, ""]):
        """What one device does."""
        over = OverMesh(self.attention, given.table, self.cfg, self.deal, self.with_routes)
        links, row = Links.of(self.deal), None
        q, k, v = over._to_heads(text, video, links)
        if self.deal.groups > 1:
            k, v = over._in_order(links.gathered(jnp.stack([k, v])))
            row = self.deal.rows(links.group)
        queries = given.queries(row)
        out, routes, phi = continued(
            self.attention, q, k, v, queries, given, kept, index, self.cfg, with_phi=self.with_new
        )
        seen = Seen(
            over._all_routes(routes, links) if self.with_routes else None,
            None if phi is None else New(k[None], v[None], phi[None]),
        )
        return over._to_tokens(out, text[0].shape[1], links), seen


@typed
def remembered(kept: Kept, new: New, given: Given) -> Kept:
    """With the given shots finished.

    Args:
        new: Of all layers, as the first axis.
    """
    video = given.chunk_of[:, given.text_tokens :] >= 0
    first, count = given.first_video, jnp.sum(video, axis=1)

    def rows(kept: Rows, new: Array) -> Rows:
        return kept.written(new[:, :, :, given.text_tokens :], first, count)

    def text(kept: Array, new: Array) -> Array:
        of_layers = jax.vmap(given.in_text, in_axes=(0, 1), out_axes=1)
        return jax.vmap(of_layers, in_axes=(1, 0))(new, kept) if given.table.text_tokens else kept

    phi = jnp.moveaxis(new.phi, 0, 2)
    return Kept(rows(kept.k, new.k), rows(kept.v, new.v), text(kept.text_k, new.k), text(kept.text_v, new.v), phi)
