"""Attention of one scene over R groups of tokens without gathering keys: queries go to where their picks are held.

homes.py says who has what. Of each group, for its heads:

(a) Holders. Keys and values of all chunks go to their holders, whose means of them go everywhere: routes are those of
    one device, bit for bit.
(b) Anchors. q, k and v go home: each group gets whole frames. Text goes everywhere. At home, video attends to text and
    to what lives there of its shot; then keys and values are passed on, one home further in both directions in each
    round, as far as a shot or chunk reaches. Text attends to the video of each home, and to text at the first; what it
    finds at all of them goes back to where it came from.
(c) Picks. Each query goes once to every holder that has picks of it, which attends to these and sends the output and
    its log-sum-exp back. That takes as many rounds as the fullest (sender, holder, head) needs: no pick is ever
    dropped, whatever the routes, and buffers are static.
(d) Parts of a query are merged where it came from, in the order of its picks.

How many rounds there are is counted from lengths and routes, the same on all devices of the mesh; it is data, in one
compiled program. Backward the same rounds bring d_out, the final log-sum-exp and delta along, and give back dq; dk and
dv are summed in float32 where the keys are, in the order of rounds, and return as the keys came.

A frame that R parts don't divide has tokens in two parts. Both get the output; gradients are of the first.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.attention.backends import Backend, implementation
from moc_jax.attention.homes import (
    Homes,
    batch_of,
    copies,
    held_table,
    holders,
    outgoing,
    queries_at,
    resident,
    ring_rounds,
    rows_of,
    text_queries,
)
from moc_jax.attention.layout import Queries
from moc_jax.attention.links import Links
from moc_jax.attention.residuals import named_outputs
from moc_jax.attention.routing import first_chunks
from moc_jax.attention.statistics import Part, merge, row_dot
from moc_jax.attention.words import packed, unpacked
from moc_jax.config import MoCConfig
from moc_jax.scene import ChunkTable
from moc_jax.shapes import Array, Float, Float32, Int


class Dispatch(NamedTuple):
    """What is static of it."""

    homes: Homes
    links: Links
    axes: tuple[str, ...]
    """Of the mesh, whose devices all do as many rounds."""
    cfg: MoCConfig
    backend: Backend

    # -------------------------------------------------------------------------------------------- (a)

    def held(self, k: Float[Array, "B Q H D"], v: Float[Array, "B Q H D"], table: ChunkTable):
        """Keys and values side by side [B, S m, H, 2 D] of the chunks that this group holds; without gradient."""
        ways = copies(table, holders(table, self.homes), self.homes, self.links.group)
        video = lax.stop_gradient(jnp.concatenate([k, v], axis=-1)[:, self.homes.text_run :])
        return _taken(self.links.across(_taken(video, ways.sent), axis=1), ways.held)

    def phi(self, k: Float[Array, "B _ H D"], table: ChunkTable) -> Float32[Array, "B H _ D"]:
        """`columns.columns` of all chunks, from the keys that this group holds."""
        homes, count, who = self.homes, self.cfg.descriptors, holders(table, self.homes)
        mine, plain = held_table(table, who, homes, self.links.group), dataclasses.replace(self.cfg, sink_chunks=0)
        of_all = self.links.joined(implementation(self.backend).means(k, mine, plain, self.backend), axis=2)
        of_all = of_all.reshape(*of_all.shape[:2], homes.deal.groups * homes.slots, -1)
        place, there = (x[:, None, :, None] for x in (who.holder * homes.slots + who.slot, who.holder >= 0))
        found = jnp.where(there, jnp.take_along_axis(of_all, jnp.maximum(place, 0), axis=2), 0.0)
        barred = jnp.repeat(first_chunks(table, self.cfg), count, axis=1)[:, None, :, None]
        return jnp.where(barred, jnp.nan, found.reshape(*found.shape[:2], -1, k.shape[-1]))

    # -------------------------------------------------------------------------------------------- the whole

    def __call__(self, q, k, v, held, routes: Int[Array, "B H Q K"], table: ChunkTable) -> Float[Array, "B Q H D"]:
        """Outputs of a group's tokens, of which q, k and v are, as `Deal.rows` has them.

        Args:
            held: `self.held(k, v, table)`.
        """
        with jax.named_scope("moc_attention"):
            return _attend(q, k, v, held, routes, table, self)

    def at_home(self, table: ChunkTable, text: Array | None) -> ChunkTable:
        """Keys of (b) before any are passed on; `text` as for `resident`."""
        return resident(table, self.homes, [self.links.group], [True], text)

    def part(self, q, keys, routes, queries: Queries, table: ChunkTable) -> Part:
        """What `keys`, k and v side by side, give."""
        k, v = jnp.split(keys, 2, axis=-1)
        return implementation(self.backend).part(q, k, v, routes, queries, table, self.cfg, self.backend)

    def gradients(self, q, keys, routes, d_out, lse, delta, queries: Queries, table: ChunkTable):
        """dq, and dk and dv side by side, in float32."""
        k, v = jnp.split(keys, 2, axis=-1)
        d_q, d_k, d_v = implementation(self.backend).part_gradients(
            q, k, v, routes, d_out, lse, delta, queries, table, self.cfg, self.backend
        )
        return d_q.astype(jnp.float32), jnp.concatenate([d_k, d_v], axis=-1).astype(jnp.float32)

    # -------------------------------------------------------------------------------------------- ways

    def to_home(self, video: Float[Array, "B Q H E"]) -> Float[Array, "B _ H E"]:
        """A group's video rows -> the tokens of its home."""
        homes, deal = self.homes, self.homes.deal
        x = video.reshape(len(video), deal.frames, deal.part, *video.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, deal.groups * homes.frames - deal.frames)] + [(0, 0)] * (x.ndim - 2))
        x = self.links.across(x, axis=1).reshape(len(video), deal.groups, homes.frames, *x.shape[2:])
        return deal.assembled(x)

    def from_home(self, video: Float[Array, "B _ H E"]) -> Float[Array, "B Q H E"]:
        """The other way; tokens that two groups have go to both."""
        homes, deal = self.homes, self.homes.deal
        x = video.reshape(len(video), homes.frames, deal.frame, *video.shape[2:])
        first = deal.first(jnp.arange(deal.groups))
        x = jnp.moveaxis(x[:, :, first[:, None] + jnp.arange(deal.part)[None]], 2, 1)
        x = self.links.across(x.reshape(len(video), -1, *x.shape[3:]), axis=1)
        return x.reshape(len(video), -1, *video.shape[2:])[:, : deal.frames * deal.part]

    def first_copies(self, video: Float[Array, "B Q H E"]) -> Float[Array, "B Q H E"]:
        """0 for tokens that a group before this one has, too."""
        inside = self.homes.deal.first(self.links.group) + jnp.arange(video.shape[1]) % self.homes.deal.part
        return jnp.where(self.homes.first_copy(self.links.group, inside)[None, :, None, None], video, 0)

    def all_text(self, text: Float[Array, "B _ H E"]) -> Float[Array, "B L H E"]:
        """A group's text -> all of it."""
        return self.links.joined(text, axis=1)[:, : self.homes.deal.text]

    def text_shares(self, text: Float[Array, "B L H E"]) -> list[Float[Array, "B _ H E"]]:
        """What this group has of all text -> what all groups have of this group's text."""
        more = self.homes.deal.text_rows - text.shape[1]
        x = self.links.across(jnp.pad(text, ((0, 0), (0, more), (0, 0), (0, 0))), axis=1)
        return jnp.split(x, self.homes.deal.groups, axis=1)

    def agreed(self, rounds: Int[Array, ""]) -> Int[Array, ""]:
        """The most that any device needs."""
        return lax.pmax(rounds, self.axes)

    # -------------------------------------------------------------------------------------------- rounds

    def around(self, keys: Float[Array, "B _ H E"], table: ChunkTable, visit, carry):
        """visit(i, keys of two homes, their table, whether the one behind comes first, carry), home after home."""
        groups, group = self.homes.deal.groups, self.links.group

        def one(state):
            i, before, behind, carry = state
            before, behind = self.links.shifted(before, 1), self.links.shifted(behind, -1)
            at = (group - i) % groups, (group + i) % groups
            swap = at[0] > at[1]
            low, high = jnp.where(swap, behind, before), jnp.where(swap, before, behind)
            of_both = resident(table, self.homes, [jnp.minimum(*at), jnp.maximum(*at)], [True, at[0] != at[1]])
            return i + 1, before, behind, visit(i, jnp.concatenate([low, high], axis=1), of_both, swap, carry)

        rounds = self.agreed(ring_rounds(table, self.cfg, self.homes))
        with jax.named_scope("moc_around"):
            return lax.while_loop(lambda state: state[0] <= rounds, one, (jnp.int32(1), keys, keys, carry))[-1]

    def to_holders(self, arrays: list[Array], routes: Int[Array, "B H Q K"], table: ChunkTable, serve, like, carry):
        """Brings rows of queries to the holders of their picks, and what is found there back.

        Args:
            arrays: Of video rows [B, H, Q, E].
            routes: Theirs.
            serve: (arrays of the rows that came [B, H, J, E], their picks among this group's slots, carry) -> arrays,
                carry.
            like: For each array that `serve` gives, E, its type, and what is there where nothing comes back.

        Returns:
            What came back, for each of a query's holders [B, H, Q, places, E], and the carry.
        """
        homes, dtype = self.homes, arrays[0].dtype
        out = outgoing(routes, holders(table, homes), homes)
        batch, heads, _, rows = out.order.shape
        start = [jnp.full((batch, heads, rows * homes.places, size), value, kind) for size, kind, value in like]

        def travelled(arrays: list[Array]) -> list[Array]:
            return unpacked(self.links.across(packed(arrays, dtype), axis=2), arrays)

        def one(state):
            i, found, carry = state
            some = batch_of(out, homes, i)
            sent = [jnp.take_along_axis(x, some.row[..., None], axis=2) for x in arrays]
            *came, slots = travelled([*sent, some.slots])
            answers, carry = serve(came, slots, carry)
            answers = travelled([x.astype(kind) for x, (_, kind, _) in zip(answers, like, strict=True)])
            return i + 1, [_put(x, some.pair, rows) for x, rows in zip(found, answers, strict=True)], carry

        rounds = self.agreed(-(-jnp.max(out.count) // homes.batch))
        with jax.named_scope("moc_served"):
            _, found, carry = lax.while_loop(lambda state: state[0] < rounds, one, (jnp.int32(0), start, carry))
        return [x.reshape(batch, heads, rows, homes.places, -1) for x in found], carry

    def of_slots(self, rows: int, batch: int) -> Queries:
        """Rows that came to a holder. What they pick is all that is asked of them, so that one slot has them all."""
        number = jnp.zeros((batch, self.homes.slots), jnp.int32)
        return Queries(jnp.zeros((batch, rows), jnp.int32), number, number.at[:, 0].set(rows), 0, 0)


def _taken(x: Array, places: tuple[Array, Array]) -> Array:
    """Rows of x [B, N, H, E], 0 where there are none."""
    index, there = places
    return jnp.where(there[..., None, None], rows_of(x, index), 0)


def _put(x: Array, index: Int[Array, "B H J"], rows: Array) -> Array:
    """x [B, H, N, E] with rows [B, H, J, E] in their places, each its own; those beyond x are left out."""

    def one(x, index, rows):
        return x.at[index].set(rows, mode="drop", unique_indices=True)

    return jax.vmap(jax.vmap(one))(x, index, rows)


def _by_head(x: Array) -> Array:
    """[B, Q, H, E] <-> [B, H, Q, E]."""
    return jnp.swapaxes(x, 1, 2)


def _column(x: Float32[Array, "B H Q"]) -> Float32[Array, "B Q H 1"]:
    """Statistics beside vectors."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def _row(x: Float32[Array, "B Q H 1"]) -> Float32[Array, "B H Q"]:
    """The inverse."""
    return jnp.swapaxes(x[..., 0], 1, 2)


# ------------------------------------------------------------------------------------------------ forward


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, held, routes, table, static: Dispatch):
    return _attend_forward(q, k, v, held, routes, table, static)[0]


def _attend_forward(q, k, v, held, routes, table, static: Dispatch):
    run = static.homes.text_run
    qkv = jnp.concatenate([q, k, v], axis=-1)
    home, text = static.to_home(qkv[:, run:]), static.all_text(qkv[:, :run])
    parts = [_anchors_of_video(home, text, table, static)]
    if routes.shape[-1]:
        parts += _picks(q[:, run:], held, routes[:, :, run:], table, static)
    found = [merge(*parts)]
    if static.homes.deal.text:
        found.insert(0, _anchors_of_text(home, text, table, static))
    outs, lses = zip(*found, strict=True)
    out, lse = named_outputs(jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2))
    return out, (q[:, run:], home, text, held, routes, table, out, lse)


def _apart(qkv: Float[Array, "B Q H E"]) -> tuple[Array, Array]:
    """q, and k and v side by side."""
    dim = qkv.shape[-1] // 3
    return qkv[..., :dim], qkv[..., dim:]


def _anchors_of_video(home, text, table: ChunkTable, static: Dispatch) -> Part:
    """Where the queries came from."""
    (q, keys), (_, of_text) = _apart(home), _apart(text)
    queries = queries_at(static.at_home(table, None))
    near = static.at_home(table, jnp.array(True))
    out, lse = static.part(q, jnp.concatenate([of_text, keys], axis=1), None, queries, near)

    def visit(i, keys, table, swap, so_far):
        return merge(so_far, static.part(q, keys, None, queries, table))

    out, lse = static.around(keys, table, visit, (out.astype(jnp.float32), lse))
    like = [out.astype(q.dtype), _column(lse)]
    back = static.from_home(packed(like, q.dtype))
    out, lse = unpacked(back, like)
    return out, _row(lse)


def _anchors_of_text(home, text, table: ChunkTable, static: Dispatch) -> Part:
    """Of this group's text, merged from what all homes have for it."""
    (q, of_text), (_, keys) = _apart(text), _apart(home)
    near = static.at_home(table, static.links.group == 0)
    out, lse = static.part(q, jnp.concatenate([of_text, keys], axis=1), None, text_queries(table), near)
    like = [out, _column(lse)]
    shares = [unpacked(x, like) for x in static.text_shares(packed(like, q.dtype))]
    return merge(*[(out, _row(lse)) for out, lse in shares])


def _picks(q, held, routes, table: ChunkTable, static: Dispatch) -> list[Part]:
    """What a query finds at each of its holders."""
    slots_of = held_table(table, holders(table, static.homes), static.homes, static.links.group)

    def serve(came, slots, carry):
        queries = static.of_slots(slots.shape[2], len(q))
        out, lse = static.part(_by_head(came[0]), held, slots, queries, slots_of)
        return [_by_head(out), lse[..., None]], carry

    like = [(q.shape[-1], q.dtype, 0), (1, jnp.float32, -jnp.inf)]
    (out, lse), _ = static.to_holders([_by_head(q)], routes, table, serve, like, ())
    return [(_by_head(out[:, :, :, i]), lse[:, :, :, i, 0]) for i in range(static.homes.places)]


# ------------------------------------------------------------------------------------------------ backward


class _Final(NamedTuple):
    """What gradients need of each query."""

    d_out: Float[Array, "B Q H D"]
    lse: Float32[Array, "B Q H 1"]
    delta: Float32[Array, "B Q H 1"]

    def sent(self, way: Callable[[Array], Array]) -> "_Final":
        """By one of the ways of `Dispatch`."""
        words = way(packed([*self], self.d_out.dtype))
        return _Final(*unpacked(words, [*self]))

    @property
    def arguments(self) -> tuple[Array, Array, Array]:
        """As backends take them."""
        return self.d_out, _row(self.lse), _row(self.delta)


def _attend_backward(static: Dispatch, residuals, d_out):
    q, home, text, held, routes, table, out, lse = residuals
    run, dtype = static.homes.text_run, out.dtype
    d_out = jnp.concatenate([d_out[:, :run], static.first_copies(d_out[:, run:])], axis=1).astype(dtype)
    final = _Final(d_out, _column(lse), row_dot(out, d_out)[..., None])
    of_text, of_video = _Final(*[x[:, :run] for x in final]), _Final(*[x[:, run:] for x in final])

    d_home, d_text = _anchor_gradients(home, text, of_text.sent(static.all_text), of_video, table, static)
    d_video = static.first_copies(static.from_home(d_home.astype(dtype))).astype(jnp.float32)
    if routes.shape[-1]:
        d_video += jnp.concatenate(_pick_gradients(q, held, routes[:, :, run:], of_video, table, static), axis=-1)
    parts = [d_video]
    if static.homes.deal.text:
        shares = static.text_shares(d_text.astype(dtype))
        parts.insert(0, functools.reduce(jnp.add, [x.astype(jnp.float32) for x in shares]))
    d_q, d_k, d_v = jnp.split(jnp.concatenate(parts, axis=1).astype(dtype), 3, axis=-1)
    return d_q, d_k, d_v, jnp.zeros_like(held), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _anchor_gradients(home, text, of_text: _Final, of_video: _Final, table: ChunkTable, static: Dispatch):
    """Of q, k and v side by side: of this home's video, and this home's share of those of all text."""
    (q, keys), (q_text, keys_of_text), final = _apart(home), _apart(text), of_video.sent(static.to_home)
    queries, near = queries_at(static.at_home(table, None)), jnp.concatenate([keys_of_text, keys], axis=1)
    length = q_text.shape[1]
    here = static.at_home(table, jnp.array(True))
    d_q, d_near = static.gradients(q, near, None, *final.arguments, queries, here)
    d_q_text = q_text
    if length:
        at_first = static.at_home(table, static.links.group == 0)
        d_q_text, more = static.gradients(q_text, near, None, *of_text.arguments, text_queries(table), at_first)
        d_near += more

    def visit(i, keys, table, swap, so_far):
        d_q, d_keys = static.gradients(q, keys, None, *final.arguments, queries, table)
        low, high = jnp.split(d_keys.astype(q.dtype), 2, axis=1)
        before, behind = jnp.where(swap, high, low), jnp.where(swap, low, high)
        before, behind = static.links.shifted_by(before, i, sign=-1), static.links.shifted_by(behind, i, sign=1)
        return so_far[0] + d_q, so_far[1] + before.astype(jnp.float32) + behind.astype(jnp.float32)

    d_q, d_keys = static.around(keys, table, visit, (d_q, d_near[:, length:]))
    d_text = jnp.concatenate([d_q_text.astype(jnp.float32), d_near[:, :length]], axis=-1)
    return jnp.concatenate([d_q, d_keys], axis=-1), d_text


def _pick_gradients(q, held, routes, final: _Final, table: ChunkTable, static: Dispatch) -> list[Array]:
    """Of a group's video: dq, and dk and dv side by side."""
    who = holders(table, static.homes)
    slots_of = held_table(table, who, static.homes, static.links.group)

    def serve(came, slots, d_held):
        q, d_out, lse, delta = (_by_head(x) for x in came)
        queries = static.of_slots(slots.shape[2], len(q))
        d_q, more = static.gradients(q, held, slots, *_Final(d_out, lse, delta).arguments, queries, slots_of)
        return [_by_head(d_q)], d_held + more

    sent = [_by_head(x) for x in (q, *final)]
    like = [(q.shape[-1], q.dtype, 0)]
    (d_q,), d_held = static.to_holders(sent, routes, table, serve, like, jnp.zeros(held.shape, jnp.float32))
    d_q = functools.reduce(jnp.add, [d_q[:, :, :, i].astype(jnp.float32) for i in range(static.homes.places)])
    ways = copies(table, who, static.homes, static.links.group)
    d_keys = _taken(static.links.across(_taken(d_held.astype(q.dtype), ways.returned), axis=1), ways.kept)
    return [_by_head(d_q), d_keys.astype(jnp.float32)]
