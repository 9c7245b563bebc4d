"""What users give to attention, checked before any work: an error names the value, the limit and the fix.

Shapes and types are known always; values where they are concrete, which they are not inside jit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moc_jax.attention.layout import Queries
from moc_jax.attention.routing import anchor_chunks
from moc_jax.config import MoCConfig
from moc_jax.scene import TEXT, VIDEO, ChunkTable
from moc_jax.shapes import Array, as_array, concrete

_FLOATS = ("float32", "bfloat16", "float16")
_PER_CHUNK = ("kind", "shot", "start", "length")


def check_settings(cfg: object) -> None:
    """Raises TypeError unless `cfg` is a MoCConfig."""
    if not isinstance(cfg, MoCConfig):
        raise TypeError(f"cfg is a {type(cfg).__name__}; give a MoCConfig (of a whole Config, its field moc)")


def check_vectors(*, q: object, **keys: object) -> list[Array]:
    """q [B, Q, H, D], and k and v [B, N, H, D], as arrays.

    Raises:
        TypeError: one is not an array, or of a type that attention doesn't compute in.
        ValueError: one has another rank, or sizes other than those that they share.
    """
    arrays = {}
    for name, x in {"q": q, **keys}.items():
        dtype = str(getattr(x, "dtype", "float32"))
        if dtype not in _FLOATS:
            raise TypeError(f"{name} is {dtype}; attention computes in {', '.join(_FLOATS)}: use {name}.astype(...)")
        x = as_array(name, x)
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be [B, N, H, D]: scenes, tokens, heads, size of a head"
            )
        arrays[name] = x
    q, k = arrays["q"], arrays["k"]
    if "v" in arrays and arrays["v"].shape != k.shape:
        raise ValueError(f"v has shape {arrays['v'].shape} and k {k.shape}; they must be equal")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"k has shape {k.shape} and q {q.shape}; all but their tokens must be equal")
    return list(arrays.values())


def check_table(table: object, k: Array, cfg: MoCConfig) -> ChunkTable:
    """The table with arrays for fields.

    Raises:
        TypeError: it is not a ChunkTable, or its fields are not arrays of integers.
        ValueError: its fields disagree about sizes, with k or with `cfg.chunk`; or a chunk lies beyond its block.
    """
    if not isinstance(table, ChunkTable):
        raise TypeError(f"table is a {type(table).__name__}; make a ChunkTable with moc_jax.scene.chunk_table")
    kind, shot, start, length, chunk_of = (
        as_array(f"table.{name}", getattr(table, name), integers=True) for name in (*_PER_CHUNK, "chunk_of")
    )
    table = dataclasses.replace(table, kind=kind, shot=shot, start=start, length=length, chunk_of=chunk_of)
    if table.chunk_of.shape != k.shape[:2]:
        at = table.chunk_of.shape
        of_table = f"{at[0]} scenes of {at[1]}" if len(at) == 2 else f"an array of shape {at}"
        raise ValueError(
            f"k has {k.shape[0]} scenes of {k.shape[1]} tokens, but the chunk table is for "
            f"{of_table}; build it from the same SceneShape"
        )
    for name in _PER_CHUNK:
        shape = getattr(table, name).shape
        if shape != table.kind.shape or len(shape) != 2 or shape[0] != k.shape[0]:
            raise ValueError(
                f"table.{name} has shape {shape}; kind, shot, start and length must all be "
                f"[{k.shape[0]} scenes, chunks], and kind is {table.kind.shape}"
            )
    if cfg.mode == "moc" and table.chunk is not None and table.chunk != cfg.chunk:
        raise ValueError(
            f"the chunk table was cut by {table.chunk}, but cfg.chunk is {cfg.chunk}; "
            "cut it with chunk_table(lengths, shape, cfg.chunk)"
        )
    _check_places(table, k.shape[1])
    return table


def _check_places(table: ChunkTable, tokens: int) -> None:
    values = [concrete(getattr(table, name)) for name in ("kind", "start", "length", "chunk_of")]
    known = [x for x in values if x is not None]
    if len(known) < len(values):
        return
    kind, start, length, chunk_of = known
    some = length > 0
    text, video = some & (kind == TEXT), some & (kind == VIDEO)
    end = start + length
    for wrong, limit in (
        (length < 0, "no length is below 0"),
        (some & ~text & ~video, "only text and video have tokens"),
        (text & ((start < 0) | (end > table.text_tokens)), f"text lies in [0, {table.text_tokens})"),
        (video & ((start < table.text_tokens) | (end > tokens)), f"video lies in [{table.text_tokens}, {tokens})"),
        (
            video & (length > table.max_chunk),
            f"table.max_chunk says that no video chunk has more than {table.max_chunk}",
        ),
    ):
        if wrong.any():
            b, c = np.argwhere(wrong)[0]
            raise ValueError(
                f"chunk {c} of scene {b} (kind {kind[b, c]}) is tokens [{start[b, c]}, {end[b, c]}), {length[b, c]} in "
                f"all, but {limit}: make the table with chunk_table or chunk_table_from"
            )
    if chunk_of.size and not (chunk_of.min() >= -1 and chunk_of.max() < kind.shape[1]):
        b, n = np.argwhere((chunk_of < -1) | (chunk_of >= kind.shape[1]))[0]
        raise ValueError(
            f"token {n} of scene {b} is in chunk {chunk_of[b, n]}; chunks are 0 to {kind.shape[1] - 1}, -1 is padding: "
            "make the table with chunk_table or chunk_table_from"
        )


def check_query_chunk(query_chunk: object, q: Array, table: ChunkTable) -> Array | None:
    """The chunks of the query tokens as an array [B, Q]; None where they are the table's own tokens.

    Raises:
        TypeError: they are not an array of integers.
        ValueError: they are of another shape than q; or not in runs as `moc_attention` says.
    """
    tokens = table.chunk_of.shape[1]
    if query_chunk is None:
        if q.shape[1] != tokens:
            raise ValueError(
                f"q has {q.shape[1]} tokens and the chunk table {tokens}; where they aren't the same tokens, give "
                "query_chunk, the chunk of each query token"
            )
        return None
    if q.shape[1] == 0:
        raise ValueError("q has no tokens; leave such a call out")
    values = concrete(query_chunk)
    query_chunk = as_array("query_chunk", query_chunk, integers=True)
    if query_chunk.shape != q.shape[:2]:
        raise ValueError(f"query_chunk has shape {query_chunk.shape}; for q of {q.shape} it must be {q.shape[:2]}")
    if values is not None:
        _check_runs(values, table)
    return query_chunk


def _check_runs(query_chunk: np.ndarray, table: ChunkTable) -> None:
    chunks, kind, shot = table.kind.shape[1], concrete(table.kind), concrete(table.shot)
    for b, of in enumerate(query_chunk):
        if not (of.min() >= -1 and of.max() < chunks):
            n = np.flatnonzero((of < -1) | (of >= chunks))[0]
            raise ValueError(
                f"query token {n} of scene {b} is in chunk {of[n]}; chunks are 0 to {chunks - 1}, -1 is padding"
            )
        first = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]]))
        runs = of[first]
        some = runs[runs >= 0]
        if len(set(some.tolist())) < len(some):
            twice = next(c for c in some.tolist() if (some == c).sum() > 1)
            raise ValueError(f"query tokens of chunk {twice} of scene {b} lie apart; those of a chunk must be one run")
        if kind is None or shot is None:
            continue
        video = (runs >= 0) & (kind[b][np.maximum(runs, 0)] == VIDEO)
        for of_shot in np.unique(shot[b][some]):
            at = np.flatnonzero(video & (shot[b][np.maximum(runs, 0)] == of_shot))
            if (np.diff(at) != 1).any() or (np.diff(runs[at]) <= 0).any():
                raise ValueError(
                    f"video chunks of shot {of_shot} of scene {b} have query tokens in the order "
                    f"{runs[at[0] : at[-1] + 1].tolist()}; they must follow each other, in the order of the chunks"
                )


def check_key(key: object, batch: int, heads: int) -> None:
    """Raises unless `key` is None, one key, or keys [batch, heads]."""
    if key is None:
        return
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key is {_kind(key)}; make it with jax.random.key(seed)")
    if key.shape not in ((), (batch, heads)):
        raise ValueError(f"key has shape {key.shape}; give one key, or one per scene and head: ({batch}, {heads})")


def _kind(x: object) -> str:
    return f"an array of {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


def check_statistics(q: Array, d_out: object, lse: object, delta: object) -> tuple[Array, Array, Array]:
    """d_out [B, Q, H, D], lse and delta [B, H, Q] (float32) as arrays.

    Raises:
        TypeError: one is not an array.
        ValueError: one is of another shape than q.
    """
    d_out, lse, delta = (as_array(name, x) for name, x in (("d_out", d_out), ("lse", lse), ("delta", delta)))
    rows = q.shape[0], q.shape[2], q.shape[1]
    for name, x, shape in (("d_out", d_out, q.shape), ("lse", lse, rows), ("delta", delta, rows)):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; for q of {q.shape} it must be {shape}")
    return d_out, lse.astype(jnp.float32), delta.astype(jnp.float32)


def check_routes(routes: object, q: Array, queries: Queries, table: ChunkTable, cfg: MoCConfig) -> Array:
    """Routes as an array [B, H, Q, K].

    Raises:
        TypeError: they are not an array of integers.
        ValueError: they are of another shape than q; or a query picks what doesn't exist, a chunk twice, an anchor of
            its own, or anything although it is not video.
    """
    batch, tokens, heads, _ = q.shape
    values = concrete(routes)
    routes = as_array("routes", routes, integers=True)
    if routes.ndim != 4 or routes.shape[:3] != (batch, heads, tokens):
        raise ValueError(
            f"routes have shape {routes.shape}; for q of {q.shape} they must be [{batch}, {heads}, {tokens}, K]: "
            "scenes, heads, tokens, picks"
        )
    if values is not None:
        _check_picks(values, queries, table, cfg)
    return routes


def _check_picks(routes: np.ndarray, queries: Queries, table: ChunkTable, cfg: MoCConfig) -> None:
    chunks = table.kind.shape[1]

    def refuse(wrong, what: str) -> None:
        if wrong.any():
            b, h, n = (int(i) for i in np.argwhere(wrong)[0][:3])
            raise ValueError(
                f"scene {b}, head {h}, token {n} has the routes {routes[b, h, n].tolist()}: {what}; use route()'s"
            )

    refuse((routes < -1) | (routes >= chunks), f"chunks are 0 to {chunks - 1}, and -1 for an empty slot")
    ordered = np.sort(routes, axis=-1)
    refuse((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0), "no chunk may be picked twice")
    kind, chunk_of = concrete(table.kind), concrete(queries.chunk_of)
    if kind is None or chunk_of is None:
        return
    of = np.maximum(chunk_of, 0)
    is_video = (chunk_of >= 0) & (np.take_along_axis(kind, of, axis=1) == VIDEO)
    refuse((routes >= 0) & ~is_video[:, None, :, None], "only tokens of video pick chunks")
    if concrete(table.shot) is None:
        return
    with jax.ensure_compile_time_eval():
        anchors = np.asarray(anchor_chunks(table, cfg))
    scene = np.arange(routes.shape[0])[:, None, None, None]
    is_anchor = anchors[scene, of[:, None, :, None], np.maximum(routes, 0)]
    refuse((routes >= 0) & is_anchor, "an anchor of the query is attended to anyway and can't be picked")
