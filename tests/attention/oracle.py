"""Mixture of Contexts in plain numpy and float64, one loop per rule: to be read against the paper, not to be fast.

Shares no code with `moc_jax.attention`. A scene is a list of `Chunk`s in scene order; tokens in no chunk are padding.
"""

import itertools
from typing import NamedTuple

import numpy as np

from moc_jax.scene import GLOBAL, TEXT, VIDEO


class Chunk(NamedTuple):
    kind: int
    shot: int
    start: int
    length: int

    @property
    def tokens(self):
        return range(self.start, self.start + self.length)


class Result(NamedTuple):
    routes: np.ndarray  # [B, H, N, K] chunk ids, best first; -1: no chunk
    mask: np.ndarray  # [B, H, N, N] which keys each query attends to
    out: np.ndarray  # [B, N, H, D]


# ------------------------------------------------------------------------------------------------ who may see what


def visible(scene, cfg, i):
    """Chunks that queries of chunk i could ever see."""
    seen = [j for j, chunk in enumerate(scene) if chunk.length > 0 and chunk.kind in (TEXT, VIDEO)]
    if cfg.visibility == "past":
        seen = [j for j in seen if scene[j].shot == GLOBAL or scene[j].shot <= scene[i].shot]
    return seen


def anchors(scene, cfg, i):
    """Chunks that queries of chunk i always attend to."""
    me, found = scene[i], []
    for j in visible(scene, cfg, i):
        other = scene[j]
        same_shot = other.shot == me.shot
        if cfg.mode == "dense":
            wanted = True
        elif me.kind == TEXT:
            wanted = other.kind == TEXT or same_shot
        elif other.kind == TEXT:
            wanted = cfg.text_anchor == "all" or (
                cfg.text_anchor == "own+global" and (same_shot or other.shot == GLOBAL)
            )
        elif cfg.self_anchor == "shot":
            wanted = same_shot
        elif cfg.self_anchor == "chunk":
            wanted = j == i
        elif cfg.self_anchor == "window":
            wanted = same_shot and i - cfg.window <= j <= i + cfg.window
        else:
            wanted = False
        if wanted:
            found.append(j)
    return found


def candidates(scene, cfg, i):
    """Chunks that queries of chunk i may pick."""
    if cfg.mode == "dense" or scene[i].kind != VIDEO:
        return []
    anchored = anchors(scene, cfg, i)
    found = [j for j in visible(scene, cfg, i) if scene[j].kind == VIDEO and j not in anchored + sinks(scene, cfg, i)]
    return [j for j in found if j < i] if cfg.causal_routing else found


def sinks(scene, cfg, i):
    """Chunks that queries of chunk i pick whatever their keys: the first `sink_chunks` of each earlier shot."""
    if cfg.mode == "dense" or scene[i].kind != VIDEO:
        return []
    found = []
    for shot in range(scene[i].shot):
        of_shot = [j for j, c in enumerate(scene) if c.kind == VIDEO and c.shot == shot and c.length > 0]
        found += of_shot[: cfg.sink_chunks]
    return found


# ------------------------------------------------------------------------------------------------ routing


def scores(q, k, scene, parts=1):
    """q_i . mean(keys of chunk c), and how far float32 may be off: two arrays [H, N, C] for one scene's q, k [N, H, D].

    Of the means of a chunk's equal `parts`, the largest score, and the error of the one that is most off.

    A sum of n float32 terms is off by at most about n u (sum of magnitudes), u = 2^-24; here n is at most the chunk's
    length for the mean and D for the product, plus a few roundings for the division and the products.
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    score = np.zeros((q.shape[1], q.shape[0], len(scene)))
    error = np.zeros_like(score)
    for c, chunk in enumerate(scene):
        if chunk.length == 0 or chunk.kind != VIDEO:
            continue
        edges = [part * chunk.length // parts for part in range(parts + 1)]
        spans = [k[chunk.start + begin : chunk.start + end] for begin, end in itertools.pairwise(edges) if begin < end]
        roundings = chunk.length + q.shape[2] + 4
        for h in range(q.shape[1]):
            score[h, :, c] = np.max([q[:, h] @ keys[:, h].mean(axis=0) for keys in spans], axis=0)
            sizes = [abs(q[:, h]) @ abs(keys[:, h]).mean(axis=0) for keys in spans]
            error[h, :, c] = roundings * 2.0**-24 * np.max(sizes, axis=0)
    return score, error


def route(q, k, scene, cfg, slots=0):
    """The picks [H, N, K] of one scene: best score first, ties to the lowest chunk; then sinks in so many slots."""
    picks = np.full((q.shape[1], q.shape[0], cfg.top_k + slots), -1)
    score, _ = scores(q, k, scene, cfg.descriptors)
    for i, chunk in enumerate(scene):
        allowed, always = candidates(scene, cfg, i), sinks(scene, cfg, i)
        for token in chunk.tokens:
            picks[:, token, cfg.top_k : cfg.top_k + len(always)] = always
            for h in range(q.shape[1]):
                best = sorted(allowed, key=lambda c: (-score[h, token, c], c))[: cfg.top_k]
                picks[h, token, : len(best)] = best
    return picks


def near_ties(routes, q, k, scene, cfg):
    """Checks another implementation's `routes` [H, N, K] of one scene; returns how many rows differ by near-ties.

    A row may differ from `route` only if float32 rounding can explain it: every pick scores no worse, within the
    roundings of both scores, than any later pick and than any candidate that was left out.
    """
    want = route(q, k, scene, cfg, routes.shape[-1] - cfg.top_k)
    np.testing.assert_array_equal(routes[..., cfg.top_k :], want[..., cfg.top_k :], err_msg="sinks")
    routes, want = routes[..., : cfg.top_k], want[..., : cfg.top_k]
    score, error = scores(q, k, scene, cfg.descriptors)
    chunk_of = np.full(q.shape[0], -1)
    for i, chunk in enumerate(scene):
        chunk_of[chunk.tokens] = i
    different = np.argwhere((want != routes).any(axis=-1))
    for h, token in different:
        got, where = list(routes[h, token]), f"head {h}, token {token} of chunk {chunk_of[token]}"
        allowed = candidates(scene, cfg, chunk_of[token]) if chunk_of[token] >= 0 else []
        count = min(cfg.top_k, len(allowed))
        picked, rest = got[:count], got[count:]
        assert set(picked) <= set(allowed), f"{where}: picks {got}, may pick only {allowed}"
        assert len(set(picked)) == count, f"{where}: picks {got} of {allowed}"
        assert set(rest) <= {-1}, f"{where}: picks {got} of {allowed}"
        low, high = score[h, token] - error[h, token], score[h, token] + error[h, token]
        for n, pick in enumerate(picked):
            beaten = picked[n + 1 :] + [c for c in allowed if c not in picked]
            better = [c for c in beaten if low[c] > high[pick] or (low[c] == high[pick] and c < pick)]
            assert not better, f"{where}: picks {got}, not {list(want[h, token])}, but {better} come before {pick}"
    return len(different)


# ------------------------------------------------------------------------------------------------ attention


def attended(scene, cfg, routes):
    """Which keys each query attends to: [H, N, N] for one scene's routes [H, N, K]."""
    heads, tokens, _ = routes.shape
    mask = np.zeros((heads, tokens, tokens), bool)
    for i, chunk in enumerate(scene):
        always = anchors(scene, cfg, i)
        for token in chunk.tokens:
            for h in range(heads):
                for c in [*always, *routes[h, token]]:
                    if c >= 0:
                        mask[h, token, scene[c].tokens] = True
    return mask


def attend(q, k, v, mask):
    """softmax(q k / sqrt(D)) v over the attended keys of one scene; a query that attends to nothing gives 0."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(v)
    for token in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = np.flatnonzero(mask[h, token])
            if len(keys) > 0:
                out[token, h] = _weights(q[token, h], k[keys, h]) @ v[keys, h]
    return out


def gradients(q, k, v, mask, dout):
    """dq, dk and dv of one scene for the gradient `dout` of its output; the mask is a constant."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    dq, dk, dv = np.zeros((3, *q.shape))
    for token in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = np.flatnonzero(mask[h, token])
            if len(keys) > 0:
                p = _weights(q[token, h], k[keys, h])
                dp = v[keys, h] @ dout[token, h]
                dlogits = p * (dp - p @ dp) / np.sqrt(q.shape[2])
                dq[token, h] = dlogits @ k[keys, h]
                dk[keys, h] += dlogits[:, None] * q[token, h]
                dv[keys, h] += p[:, None] * dout[token, h]
    return dq, dk, dv


def _weights(query, keys):
    logits = keys @ query / np.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def moc(q, k, v, scenes, cfg, routes=None) -> Result:
    """Routes, mask and output of q, k, v [B, N, H, D]; `routes` [B, H, N, K], if given, stand in for routing."""
    if routes is None:
        routes = [route(q[b], k[b], scene, cfg) for b, scene in enumerate(scenes)]
    mask = [attended(scene, cfg, routes[b]) for b, scene in enumerate(scenes)]
    out = [attend(q[b], k[b], v[b], mask[b]) for b in range(len(scenes))]
    return Result(np.asarray(routes), np.asarray(mask), np.asarray(out))


def moc_gradients(q, k, v, mask, dout):
    """dq, dk and dv [B, N, H, D]."""
    return tuple(np.stack(g) for g in zip(*(gradients(*scene) for scene in zip(q, k, v, mask, dout))))
