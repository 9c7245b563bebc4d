"""Where queries meet their keys when keys are not gathered (dispatch.py): homes for anchors, holders for picks.

A group's tokens are its part of every frame (deal.py), so that what is sent to any whole frames comes from all groups
alike. With F frames of n tokens, in each of which a group has a part of G, and C chunks over R groups:

    homes       group d is the home of frames [d f, (d + 1) f), f = ceil(F / R). There, queries find the keys of their
                shot that live there too; those of homes before and after are passed on (dispatch.py).
    holders     chunks that can be picked are dealt in turn, back and forth: the i-th is held by group i mod R, whole,
                or by R - 1 - i mod R if its slot i // R is odd. Causal routing picks early chunks most: so they lie
                apart.

All sizes are static and bound what any lengths need: a home has f n rows; a holder ceil(C / R) slots of the longest
chunk, and of such a chunk no group has more than floor(m / n) G + min(G, m mod n) rows.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.deal import Deal
from moc_jax.attention.layout import Queries, round_up, running_sum
from moc_jax.attention.routing import anchor_chunks, pickable_chunks, sink_slots
from moc_jax.config import MoCConfig
from moc_jax.scene import NO_SHOT, PAD, TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, Bool, Int

_ROUNDS = 4  # that balanced picks are served in: buffers hold a fourth of them
_SLACK = 1.1  # of a round's rows: so much more than the mean may the most be
_ROWS = 8  # that rows of a round are a multiple of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Homes:
    """Static sizes of what a group has for others."""

    deal: Deal
    slots: int
    """S: chunks of a holder."""
    longest: int
    """m: tokens of a slot."""
    usual: int
    """Picks of a query, without what is dropped in and off."""
    picks: int
    """K: the most that a query can have."""

    @classmethod
    def of(cls, deal: Deal, table: ChunkTable, cfg: MoCConfig, picks: int | None = None) -> "Homes":
        """For scenes of this table, as shapes alone tell.

        Args:
            picks: The width of routes; None: as for sampling.
        """
        chunks = table.kind.shape[1]
        if table.chunk is not None and table.max_shots is not None:  # a caption for each shot, and the global one
            chunks = max(1, chunks - table.max_shots - 1)
        usual = 0 if cfg.mode == "dense" else min(cfg.top_k, chunks) + sink_slots(table, cfg)
        return cls(
            deal=deal,
            slots=-(-chunks // deal.groups),
            longest=table.max_chunk,
            usual=usual,
            picks=usual if picks is None else picks,
        )

    @property
    def frames(self) -> int:
        """Of a home: f."""
        return -(-self.deal.frames // self.deal.groups)

    @property
    def rows(self) -> int:
        """Of a home: video tokens."""
        return self.frames * self.deal.frame

    @property
    def text_run(self) -> int:
        """Text tokens of a group."""
        return self.deal.text_rows // self.deal.groups

    @property
    def part(self) -> int:
        """The most rows that a group has of a chunk."""
        whole, more = divmod(self.longest, self.deal.frame)
        return whole * self.deal.part + min(self.deal.part, more)

    @property
    def places(self) -> int:
        """The most holders that a query has its picks at."""
        return min(self.picks, self.deal.groups)

    @property
    def named(self) -> int:
        """The most picks of a query at one holder."""
        return min(self.picks, self.slots)

    @property
    def batch(self) -> int:
        """Queries that a group sends each holder in a round, of each head: a fourth of what random picks need.

        As many rounds follow as are needed: this bounds memory, and not what can be picked.
        """
        queries, groups = self.deal.frames * self.deal.part, self.deal.groups
        mean = queries * (1 - (1 - 1 / groups) ** self.usual)
        return round_up(max(1, math.ceil(_SLACK * mean / _ROUNDS)), _ROWS)

    def first_copy(self, group: Array, inside: Array) -> Bool[Array, "..."]:
        """Whether a token that lies so far inside a frame and in a group's part of it is in no part before."""
        return self._owner(inside) == group

    def _owner(self, inside: Array) -> Array:
        """The first group that has such tokens of a frame."""
        return jnp.minimum(inside // self.deal.part, self.deal.frame // self.deal.part)

    def rows_before(self, video: Array, group: Array) -> Array:
        """How many of a group's video rows are tokens before this one of the video."""
        deal = self.deal
        return video // deal.frame * deal.part + jnp.clip(video % deal.frame - deal.first(group), 0, deal.part)


class Holders(NamedTuple):
    """Who holds which chunk."""

    holder: Int[Array, "B C"]  # -1: nobody can pick it
    slot: Int[Array, "B C"]
    chunk: Int[Array, "B R S"]  # -1: none


def holders(table: ChunkTable, homes: Homes) -> Holders:
    """Pickable chunks, dealt back and forth."""
    there, groups = pickable_chunks(table), homes.deal.groups
    rank = running_sum(there.astype(jnp.int32)) - 1
    holder = holder_of(rank, groups)
    index = jnp.arange(groups * homes.slots, dtype=jnp.int32)[None, :, None]
    found = there[:, None] & (rank[:, None] == index)
    chunk = jnp.where(jnp.any(found, axis=-1), jnp.argmax(found, axis=-1), -1)
    chunk = chunk.reshape(-1, homes.slots, groups)
    back = jnp.arange(homes.slots)[None, :, None] % 2 == 1
    chunk = jnp.swapaxes(jnp.where(back, chunk[..., ::-1], chunk), 1, 2)
    return Holders(jnp.where(there, holder, -1), jnp.where(there, rank // groups, 0), chunk)


def holder_of(rank, groups: int):
    """Who holds the chunk that so many are dealt before."""
    turn, place = rank // groups, rank % groups
    return place + turn % 2 * (groups - 1 - 2 * place)


class Copies(NamedTuple):
    """How a group's keys come to their holders and back: places to read, and where these hold anything.

    Rows on the way are [R S P], by group, slot and row of the group's part of the chunk.
    """

    sent: tuple[Array, Array]  # a group's video row of each row on the way
    held: tuple[Array, Array]  # the row on the way of each token of a holder [B, S m]
    returned: tuple[Array, Array]  # the token of a holder of each row on the way back
    kept: tuple[Array, Array]  # the row on the way back of each of a group's video rows


def copies(table: ChunkTable, who: Holders, homes: Homes, group: Array) -> Copies:
    """For this group, as what it has and as what it holds."""
    deal, part, slots, longest = homes.deal, homes.part, homes.slots, homes.longest
    batch = len(table.kind)

    def of_chunk(x: Array, chunk: Array, nothing: int) -> Array:
        found = jnp.take_along_axis(x, jnp.maximum(chunk, 0).reshape(batch, -1), axis=1).reshape(chunk.shape)
        return jnp.where(chunk >= 0, found, nothing)

    video = table.start - deal.text
    before = homes.rows_before(video, group)
    mine = homes.rows_before(video + table.length, group) - before
    inside = jnp.arange(part, dtype=jnp.int32)[None, None, None]

    def flat(rows: Array, there: Array) -> tuple[Array, Array]:
        return jnp.where(there, rows, 0).reshape(batch, -1), there.reshape(batch, -1)

    rows = of_chunk(before, who.chunk, 0)[..., None] + inside
    sent = flat(rows, inside < of_chunk(mine, who.chunk, 0)[..., None])

    chunk = lax.dynamic_index_in_dim(who.chunk, group, axis=1, keepdims=False)  # [B, S]
    start, length = of_chunk(video, chunk, 0)[..., None], of_chunk(table.length, chunk, 0)[..., None]
    token = jnp.arange(longest, dtype=jnp.int32)[None, None]
    at, slot = start + token, jnp.arange(slots, dtype=jnp.int32)[None, :, None]
    owner = homes._owner(at % deal.frame)
    row = at // deal.frame * deal.part + at % deal.frame - deal.first(owner)
    held = flat((owner * slots + slot) * part + row - homes.rows_before(start, owner), token < length)

    every = jnp.arange(deal.groups, dtype=jnp.int32)[None, :, None]
    start, length = start[:, None, :, 0], length[:, None, :, 0]  # [B, 1, S]
    begin = homes.rows_before(start, every)
    row = begin[..., None] + inside  # [B, R, S, P]
    across = deal.first(every)[..., None] + row % deal.part
    token = row // deal.part * deal.frame + across - start[..., None]
    there = inside < (homes.rows_before(start + length, every) - begin)[..., None]
    there &= homes.first_copy(every[..., None], across)
    returned = flat(slot[:, None] * longest + token, there)

    row = jnp.arange(deal.frames * deal.part, dtype=jnp.int32)
    chunk = _video_chunks(table, homes)[:, row // deal.part * deal.frame + deal.first(group) + row % deal.part]
    holder = of_chunk(who.holder, chunk, -1)
    place = (holder * slots + of_chunk(who.slot, chunk, 0)) * part + row[None] - of_chunk(before, chunk, 0)
    return Copies(sent, held, returned, flat(place, holder >= 0))


def _video_chunks(table: ChunkTable, homes: Homes) -> Int[Array, "B _"]:
    """The chunks of all homes' rows; -1 beyond the scene."""
    chunk = table.chunk_of[:, table.text_tokens :]
    more = homes.deal.groups * homes.rows - chunk.shape[1]
    return jnp.pad(chunk, ((0, 0), (0, more)), constant_values=-1)


def held_table(table: ChunkTable, who: Holders, homes: Homes, group: Array) -> ChunkTable:
    """What a holder holds, as a scene of slots."""
    chunk = lax.dynamic_index_in_dim(who.chunk, group, axis=1, keepdims=False)
    there, at = chunk >= 0, jnp.maximum(chunk, 0)
    shot, length = (jnp.take_along_axis(x, at, axis=1) for x in (table.shot, table.length))
    length = jnp.where(there, length, 0)
    slot, token = jnp.arange(homes.slots, dtype=jnp.int32), jnp.arange(homes.longest, dtype=jnp.int32)
    inside = token[None, None] < length[..., None]
    return dataclasses.replace(
        table,
        kind=jnp.where(there, VIDEO, PAD),
        shot=jnp.where(there, shot, NO_SHOT),
        start=jnp.broadcast_to(slot[None] * homes.longest, length.shape),
        length=length,
        chunk_of=jnp.where(inside, slot[None, :, None], -1).reshape(len(length), -1),
        text_tokens=0,
    )


def resident(
    table: ChunkTable, homes: Homes, at: Sequence[Array], there: Sequence[Array | bool], text: Array | None = None
) -> ChunkTable:
    """The scene's chunks, with what of them lies in some homes, in their order, as keys one home after the other.

    Args:
        at: The homes, in rising order.
        there: Whether each is to be seen.
        text: Whether the text before them is; None: there is none.
    """
    kind, rows = table.kind, homes.rows
    first = 0 if text is None else table.text_tokens
    chunks = _video_chunks(table, homes)

    def before(token: Array) -> Array:
        inside = [jnp.where(seen, jnp.clip(token - home * rows, 0, rows), 0) for home, seen in zip(at, there)]
        return first + functools.reduce(jnp.add, inside)

    video = table.start - table.text_tokens
    start = before(video)
    length = jnp.where(kind == VIDEO, before(video + table.length) - start, 0)
    of_homes = [lax.dynamic_slice_in_dim(chunks, home * rows, rows, axis=1) for home in at]
    chunk_of = [jnp.where(seen, x, -1) for x, seen in zip(of_homes, there)]
    if text is not None:
        start = jnp.where(kind == TEXT, table.start, start)
        length = jnp.where((kind == TEXT) & text, table.length, length)
        chunk_of.insert(0, jnp.where(text, table.chunk_of[:, :first], -1))
    return dataclasses.replace(
        table,
        start=start,
        length=length,
        chunk_of=jnp.concatenate(chunk_of, axis=1),
        text_tokens=first,
    )


def queries_at(table: ChunkTable) -> Queries:
    """The video of `resident` without text as queries."""
    return Queries(table.chunk_of, table.start, table.length, text_tokens=0, first_video=0)


def text_queries(table: ChunkTable) -> Queries:
    """All of a scene's text as queries."""
    text, length = table.text_tokens, jnp.where(table.kind == TEXT, table.length, 0)
    return Queries(table.chunk_of[:, :text], table.start, length, text_tokens=text, first_video=text)


def ring_rounds(table: ChunkTable, cfg: MoCConfig, homes: Homes) -> Int[Array, ""]:
    """How many homes before and behind its own have anchors of a query; R / 2 are all."""
    video = table.start - table.text_tokens
    first, last = video // homes.rows, (video + table.length - 1) // homes.rows
    there = pickable_chunks(table)
    pairs = anchor_chunks(table, cfg) & there[:, :, None] & there[:, None, :]
    apart = jnp.abs(last[:, :, None] - first[:, None, :])
    apart = jnp.maximum(apart, jnp.abs(first[:, :, None] - last[:, None, :]))
    return jnp.minimum(jnp.max(jnp.where(pairs, apart, 0)), homes.deal.groups // 2)


# ------------------------------------------------------------------------------------------------ queries on their way


class Outgoing(NamedTuple):
    """Which queries a group sends to whom: one row for each holder of a query's picks, whatever of them it holds."""

    order: Int[Array, "B H R Q"]  # the video rows with picks at each holder, first
    count: Int[Array, "B H R"]  # and how many they are
    place: Int[Array, "B H R Q"]  # which of a video row's holders this one is
    holder: Int[Array, "B H Q K"]  # of each pick; -1: none
    slot: Int[Array, "B H Q K"]


def outgoing(routes: Int[Array, "B H Q K"], who: Holders, homes: Homes) -> Outgoing:
    """Of video rows, by their routes."""
    scene = jnp.arange(len(routes))[:, None, None, None]
    holder = jnp.where(routes >= 0, who.holder[scene, jnp.maximum(routes, 0)], -1)
    slot = who.slot[scene, jnp.maximum(routes, 0)]
    earlier = jnp.tri(holder.shape[-1], k=-1, dtype=bool)[None, None, None]
    leads = (holder >= 0) & ~jnp.any((holder[..., None] == holder[..., None, :]) & earlier, axis=-1)
    place = running_sum(leads.astype(jnp.int32)) - 1
    every = jnp.arange(homes.deal.groups, dtype=jnp.int32)[None, None, :, None, None]
    here = leads[:, :, None] & (holder[:, :, None] == every)  # [B, H, R, Q, K]
    place = jnp.max(jnp.where(here, place[:, :, None], 0), axis=-1, initial=0)
    goes = jnp.any(here, axis=-1)
    order = jnp.argsort(~goes, axis=-1, stable=True).astype(jnp.int32)
    return Outgoing(order, jnp.sum(goes, axis=-1, dtype=jnp.int32), place, holder, slot)


class Batch(NamedTuple):
    """A round's rows of `Outgoing`."""

    row: Int[Array, "B H _"]  # R batches of video rows
    there: Bool[Array, "B H _"]
    pair: Int[Array, "B H _"]  # where what comes back belongs: row x places + place; beyond all where nothing does
    slots: Int[Array, "B H _ K"]  # the picks at the holder that a row goes to; -1 behind them


def batch_of(out: Outgoing, homes: Homes, i: Array) -> Batch:
    """The i-th round's."""
    size, (batch, heads, groups, rows) = homes.batch, out.order.shape
    order = jnp.pad(out.order, ((0, 0),) * 3 + ((0, size),))
    row = lax.dynamic_slice_in_dim(order, jnp.minimum(i * size, rows), size, axis=3)
    index = jnp.arange(size, dtype=jnp.int32)[None, None, None]
    number = i * size + index
    there = number < out.count[..., None]
    place = jnp.take_along_axis(out.place, row, axis=3)
    every = jnp.arange(groups, dtype=jnp.int32)
    beyond = rows * homes.places + every[None, None, :, None] * size + index
    pair = jnp.where(there, row * homes.places + place, beyond)
    row, there, pair = (x.reshape(batch, heads, groups * size) for x in (row, there, pair))
    holder, slot = (jnp.take_along_axis(x, row[..., None], axis=2) for x in (out.holder, out.slot))
    mine = (holder == jnp.repeat(every, size)[None, None, :, None]) & there[..., None]
    slots = jnp.sort(jnp.where(mine, slot, -1), axis=-1, descending=True)[..., : homes.named]
    return Batch(row, there, pair, slots)


def rows_of(x: Array, index: Int[Array, "B R"]) -> Array:
    """Rows [B, R, ...] of x [B, N, ...]."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds"))(x, index)
