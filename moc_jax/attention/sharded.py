"""Attention over a mesh: scenes over data and fsdp, tokens over context, heads over tensor, by one shard_map.

A device of a scene has a run of the tokens and, of these, the heads that its tensor shard has (deal.py). With U groups
of heads and R groups of tokens, U R devices:

(a) Heads. q, k and v, packed, go to where their heads are: one all_to_all among the U devices of a group. Each then has
    all of its group's tokens, for 1/U of the heads.
(b) Keys. For R > 1, k and v are gathered from the R devices that have the same heads. Queries need not be keys: each
    serves its own group's, against all of them. So it has all descriptors, and routes and outputs are those of one
    device, bit for bit where the backend's don't depend on which other queries there are. Or queries are dispatched
    to where the keys of their picks are (dispatch.py), where that moves fewer bytes (accounting.py).
(c) Outputs go back to where their tokens are: one all_to_all.

With `parts`, (a) to (c) are done for some of each group's heads after the others, which need nothing of each other: the
compiler can have one part's exchange run beside another's attention.

Backward is the transpose: dk and dv of a group's queries go to where their tokens are, and are summed there in float32,
in the order of the groups. All shapes are static and lengths are data; nothing depends on timing.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moc_jax.attention.accounting import chosen_exchange
from moc_jax.attention.api import RoutedAttention, SceneAttention, luck_keys
from moc_jax.attention.deal import Deal, head_groups
from moc_jax.attention.layout import queries_of
from moc_jax.attention.links import CONTEXT, Links
from moc_jax.attention.residuals import INPUTS
from moc_jax.config import ConfigError, ExchangeKind, MoCConfig
from moc_jax.scene import ChunkTable, SceneShape
from moc_jax.shapes import Array, Float, Int, Key
from moc_jax.sharding import RULES, divided

QKV = tuple[Float[Array, "B _ H D"], Float[Array, "B _ H D"], Float[Array, "B _ H D"]]


def deal_of(shape: SceneShape, heads: int, attention: SceneAttention) -> Deal:
    """How scenes of this shape lie on the mesh in context; as on one device where there is none.

    Raises:
        ConfigError: the tensor axis does not divide `heads`, or `attention.head_groups` what it must.
    """
    mesh = jax.sharding.get_abstract_mesh()
    context, tensor = (1, 1) if mesh.empty else (mesh.shape[CONTEXT], mesh.shape["tensor"])
    if heads % tensor:
        raise ConfigError(f"mesh.tensor = {tensor} does not divide {heads} heads")
    wanted = attention.head_groups if isinstance(attention, RoutedAttention) else 0
    groups = head_groups(heads // tensor, context, wanted)
    return Deal.of(shape, groups=context // groups, head_groups=groups, sharing=tensor)


class OverMesh(NamedTuple):
    """Attention over a scene's chunks, of tokens that lie as `deal` says."""

    attention: SceneAttention
    table: ChunkTable
    cfg: MoCConfig
    deal: Deal
    with_routes: bool

    def __call__(
        self, text: QKV, video: QKV, keys: Key[Array, "B H"] | None
    ) -> tuple[tuple[Float[Array, "B _ H D"], Float[Array, "B _ H D"]], Int[Array, "B H N K"] | None]:
        """Outputs of text and video, where their q are; and the table's tokens' routes, if they are asked for.

        Args:
            text, video: q, k and v after QK-norm and rotary embedding, in the devices' order.
            keys: See `SceneAttention`.

        Raises:
            NotImplementedError: the tokens lie in groups, and `attention` serves no queries that aren't the keys.
        """
        mesh, (batch, _, heads, _) = jax.sharding.get_abstract_mesh(), text[0].shape
        luck = luck_keys(batch, heads) if self.cfg.routing == "random" and keys is None else None
        if mesh.empty or mesh.size == 1:
            return self._local(text, video, self.table, keys, luck)
        of_batch, of_keys, of_routes = (
            divided(RULES.spec("batch", *names), batch, mesh) for names in ((), ("heads",), ("heads", "table", "picks"))
        )
        of_tokens = divided(RULES.spec("batch", "tokens", "heads", "head_dim"), batch, mesh)
        over_mesh = jax.shard_map(
            self._local,
            in_specs=(of_tokens, of_tokens, of_batch, of_keys, of_keys),
            out_specs=(of_tokens, of_routes),
            check_vma=False,
        )
        return over_mesh(text, video, self.table, keys, luck)

    def _local(self, text: QKV, video: QKV, table: ChunkTable, keys, luck):
        """What one device does: for all heads at once, or for some of each group after the others."""
        wanted = self.attention.exchange_parts if isinstance(self.attention, RoutedAttention) else 1
        heads, groups = text[0].shape[2], self.deal.head_groups
        parts = max(n for n in range(1, wanted + 1) if heads // groups % n == 0)
        if parts == 1 or self.deal.devices == 1:
            return self._of_heads(text, video, table, keys, luck)

        found = []
        for part in range(parts):
            some = functools.partial(_some_heads, part=part, parts=parts, groups=groups)
            part_text, part_video = jax.tree.map(functools.partial(some, axis=2), (text, video))
            part_keys, part_luck = jax.tree.map(functools.partial(some, axis=1), (keys, luck))
            found.append(self._of_heads(part_text, part_video, table, part_keys, part_luck))
        outs, routes = zip(*found, strict=True)
        of_text, of_video = (_all_heads(of_parts, groups, axis=2) for of_parts in zip(*outs, strict=True))
        return (of_text, of_video), _all_heads(routes, groups, axis=1) if self.with_routes else None

    def _of_heads(self, text: QKV, video: QKV, table: ChunkTable, keys, luck):
        links = Links.of(self.deal)
        if self.deal.head_groups > 1:
            count = text[0].shape[2] // self.deal.head_groups
            keys, luck = (None if x is None else links.own_heads(x, count) for x in (keys, luck))
        text_size = text[0].shape[1]
        q, k, v = (checkpoint_name(x, INPUTS) for x in self._to_heads(text, video, links))
        if self.deal.groups == 1:
            out, routes = self._attend(q, k, v, table, keys, luck)
        elif isinstance(self.attention, RoutedAttention) and self._kind(self.attention, q) == "dispatch":
            axes = jax.sharding.get_abstract_mesh().axis_names
            out, routes = self.attention.dispatched(q, k, v, table, self.cfg, self.deal, axes, key=keys, luck=luck)
        else:
            keys_of_all = links.gathered(jnp.stack([k, v]))
            k, v = self._in_order(keys_of_all)
            out, routes = self._attend(q, k, v, table, keys, luck, group=links.group)
        routes = self._all_routes(routes, links) if self.with_routes else None
        return self._to_tokens(out, text_size, links), routes

    def _kind(self, attention: RoutedAttention, q: Float[Array, "B Q H D"]) -> ExchangeKind:
        """How groups of tokens read each other's keys."""
        sizes = dict(heads=q.shape[2] * self.deal.head_groups, head_dim=q.shape[3], element_bytes=q.dtype.itemsize)
        return chosen_exchange(self.deal, self.table, self.cfg, attention.exchange, **sizes).kind

    def _attend(self, q, k, v, table, keys, luck, group=None):
        if not isinstance(self.attention, RoutedAttention):
            if group is not None:
                raise NotImplementedError(
                    f"{self.deal.groups} groups of tokens need RoutedAttention; with {type(self.attention).__name__}, "
                    "take a mesh whose context axis divides the heads"
                )
            return self.attention(q, k, v, table, self.cfg, key=keys)
        queries = self.deal.queries(table, group) if group is not None else queries_of(table)
        return self.attention.of_queries(q, k, v, queries, table, self.cfg, key=keys, luck=luck)

    # -------------------------------------------------------------------------------------------- (a) and (c)

    def _to_heads(self, text: QKV, video: QKV, links: Links) -> list[Float[Array, "B Q H D"]]:
        """q, k and v of the group's text and then video, for this device's heads."""
        deal = self.deal
        if deal.devices == 1:
            return [deal.trimmed(*each) for each in zip(text, video, strict=True)]
        packed = jnp.stack([jnp.concatenate(each, axis=1) for each in zip(text, video, strict=True)])
        if deal.head_groups > 1:
            packed = links.exchanged(packed, split=3, joined=2)
        runs = packed.reshape(3, packed.shape[1], deal.head_groups, -1, *packed.shape[3:])  # [3, B, U, rows, H, D]
        size = text[0].shape[1]

        def joined(x):
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        of_text, of_video = joined(runs[:, :, :, :size]), joined(runs[:, :, :, size:])
        return [deal.trimmed(*each) for each in zip(of_text, of_video, strict=True)]

    def _to_tokens(self, out: Float[Array, "B Q H D"], text_size: int, links: Links):
        """Outputs of the group's tokens for this device's heads -> of this device's tokens, text and video."""
        text, video = self.deal.filled(out)
        if self.deal.head_groups == 1:
            return text, video
        runs = [x.reshape(x.shape[0], self.deal.head_groups, -1, *x.shape[2:]) for x in (text, video)]
        packed = jnp.concatenate(runs, axis=2)
        packed = links.exchanged(packed.reshape(packed.shape[0], -1, *packed.shape[3:]), split=1, joined=2)
        return packed[:, :text_size], packed[:, text_size:]

    # -------------------------------------------------------------------------------------------- (b)

    def _in_order(self, of_groups: Float[Array, "R 2 B Q H D"]) -> Float[Array, "2 B N H D"]:
        """All groups' keys and values in the table's order."""
        deal = self.deal
        run = deal.text_rows // deal.groups
        text, video = of_groups[:, :, :, :run], of_groups[:, :, :, run:]
        groups, both, batch, _, *rest = video.shape
        text = jnp.moveaxis(text, 0, 2).reshape(both, batch, groups * run, *rest)[:, :, : deal.text]
        parts = jnp.moveaxis(video, 0, 2).reshape(both * batch, groups, deal.frames, deal.part, *rest)
        video = deal.assembled(parts).reshape(both, batch, deal.frames * deal.frame, *rest)
        return jnp.concatenate([text, video], axis=2)

    def _all_routes(self, routes: Int[Array, "B H Q K"], links: Links) -> Int[Array, "B H N K"]:
        """Those of all of a tensor shard's heads and all tokens, in the table's order."""
        if self.deal.groups > 1:
            of_groups = jnp.moveaxis(links.gathered(routes), 3, 2)[:, None]  # [R, 1, B, Q, H, K]
            routes = jnp.moveaxis(self._in_order(of_groups)[0], 1, 2)
        return links.of_all_heads(routes) if self.deal.head_groups > 1 else routes


def _some_heads(x: Array, *, part: int, parts: int, groups: int, axis: int) -> Array:
    """Of each group's heads, an equal part."""
    heads = x.shape[axis]
    apart = x.reshape(*x.shape[:axis], groups, parts, heads // groups // parts, *x.shape[axis + 1 :])
    mine = lax.index_in_dim(apart, part, axis + 1, keepdims=False)
    return mine.reshape(*x.shape[:axis], heads // parts, *x.shape[axis + 1 :])


def _all_heads(found: Sequence[Array], groups: int, *, axis: int) -> Array:
    """What was taken apart by `_some_heads`."""
    shape = found[0].shape
    apart = [x.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]) for x in found]
    return jnp.concatenate(apart, axis + 1).reshape(*shape[:axis], len(found) * shape[axis], *shape[axis + 1 :])
