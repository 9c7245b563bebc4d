"""What Wan's autoencoders are made of, over videos that come in pieces: each convolution in time keeps its last frames.

A convolution over three frames is one of single frames: those three's channels lie one behind another. XLA gives GPUs'
convolutions in two dimensions channels that lie together, as tensor cores want them, and those in three dimensions not.

A piece is [B, T, Y, X, C]. The first one begins with the video's first frame, before which there is nothing; the state
of a stream after it, `Past.kept`, has the same shapes however long the pieces are. So all of a video in one piece, and
one latent frame at a time, are the same computation.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from moc_jax.shapes import Array, Float, typed

Weights = Mapping[str, Array]
"""By diffusers' names; kernels [y, x, in, out] and matrices [in, out], of three frames with [3 in], others [C]."""
Kept = dict[str, Array]
"""By the name of a convolution, its last inputs."""

_QUERIES = 1024  # of the attention of a frame at a time: its scores are [queries, positions]
_LEAST_NORM = 1e-12


class Past:
    """What convolutions remember of earlier pieces of a stream."""

    def __init__(self, before: Kept | None):
        """None: the piece begins with the video's first frame."""
        self.first = before is None
        self._before = before or {}
        self.kept: Kept = {}
        """For the next piece."""

    def continued(self, name: str, x: Float[Array, "B T Y X C"], frames: int) -> Float[Array, "B t Y X C"]:
        """`x` with so many frames before it, zeros where there are none; its own last ones are kept."""
        nothing = x.shape[0], frames, *x.shape[2:]
        before = jnp.zeros(nothing, x.dtype) if self.first else self._before[name]
        whole = jnp.concatenate([before, x], axis=1)
        self.kept[name] = whole[:, whole.shape[1] - frames :]
        return whole


def _convolved(x: Array, w: Weights, name: str, padding: tuple[int, int], stride: int = 1) -> Array:
    """Of each frame [Y, X, C]; as much padding on either axis."""
    out = lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        w[f"{name}.weight"],
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=_precision(x),
    )
    out = out + jnp.broadcast_to(w[f"{name}.bias"], out.shape)
    return out.reshape(*x.shape[:2], *out.shape[1:])


def _threes(x: Array, stride: int = 1) -> Array:
    """Every three frames that follow one another as one, with three times the channels."""
    count = (x.shape[1] - 3) // stride + 1
    ends = [i + stride * (count - 1) + 1 for i in range(3)]
    return jnp.concatenate([x[:, i:end:stride] for i, end in enumerate(ends)], axis=-1)


def _precision(x: Array) -> lax.Precision | None:
    """Float32 is meant: accelerators would round its factors."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def linear(w: Weights, name: str, x: Float[Array, "*N C"]) -> Float[Array, "*N D"]:
    """A convolution of single positions."""
    out = jnp.einsum("...i,io->...o", x, w[f"{name}.weight"], precision=_precision(x))
    return out + jnp.broadcast_to(w[f"{name}.bias"], out.shape)


@typed
def causal(w: Weights, name: str, past: Past, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X D"]:
    """A convolution over 3 x 3 positions of a frame and of the two before it."""
    return _convolved(_threes(past.continued(name, x, 2)), w, name, (1, 1))


@typed
def norm(w: Weights, name: str, x: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    """x / |x| * sqrt(C) * gamma over channels, in float32."""
    y = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True))
    scale = w[f"{name}.gamma"].astype(jnp.float32) * x.shape[-1] ** 0.5
    return (y / jnp.maximum(size, _LEAST_NORM) * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


@typed
def residual(w: Weights, name: str, past: Past, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X D"]:
    """Norm, SiLU and convolution, twice, beside the input, which is mapped where widths differ."""
    y = causal(w, f"{name}.conv1", past, jax.nn.silu(norm(w, f"{name}.norm1", x)))
    y = causal(w, f"{name}.conv2", past, jax.nn.silu(norm(w, f"{name}.norm2", y)))
    shortcut = f"{name}.conv_shortcut"
    return y + (linear(w, shortcut, x) if f"{shortcut}.weight" in w else x)


@typed
def attention(w: Weights, name: str, x: Float[Array, "B T Y X C"]) -> Float[Array, "B T Y X C"]:
    """Each frame's positions attend to all of the frame, one head; beside the input."""
    b, t, rows, columns, c = x.shape
    frames = norm(w, f"{name}.norm", x).reshape(b * t, rows * columns, c)
    q, k, v = jnp.split(linear(w, f"{name}.to_qkv", frames), 3, axis=-1)
    precision = _precision(x)

    def attend(query: Float[Array, "n C"]) -> Float[Array, "n C"]:
        """One position of all frames."""
        scores = jnp.einsum("nc,nkc->nk", query, k, precision=precision, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(scores * c**-0.5, axis=-1).astype(v.dtype)
        return jnp.einsum("nk,nkc->nc", shares, v, precision=precision)

    out = lax.map(attend, q.swapaxes(0, 1), batch_size=_QUERIES).swapaxes(0, 1)
    return x + linear(w, f"{name}.proj", out).reshape(x.shape)


@typed
def halved(w: Weights, name: str, past: Past, x: Float[Array, "B T Y X C"], *, time: bool) -> Float[Array, "B t y x C"]:
    """Half as many rows and columns; with `time` then half as many frames, but for the video's first, which stands
    alone."""
    x = _convolved(x, w, f"{name}.resample.1", (0, 1), stride=2)
    if not time:
        return x
    conv = f"{name}.time_conv"
    alone = x[:, :1] if past.first else x[:, :0]
    if past.first:
        past.kept[conv] = x[:, -1:]
    else:
        x = past.continued(conv, x, 1)
    if x.shape[1] < 3:
        return alone
    return jnp.concatenate([alone, linear(w, conv, _threes(x, 2))], axis=1)


@typed
def doubled(
    w: Weights, name: str, past: Past, x: Float[Array, "B T Y X C"], *, time: bool
) -> Float[Array, "B t y x D"]:
    """With `time` twice as many frames, but for the video's first, of which the others know nothing here; then twice
    as many rows and columns."""
    if time:
        alone, rest = (x[:, :1], x[:, 1:]) if past.first else (x[:, :0], x)
        conv = f"{name}.time_conv"
        whole = past.continued(conv, rest, 2)
        if rest.shape[1]:
            pairs = linear(w, conv, _threes(whole))  # channels: of the earlier, of the later
            b, t, rows, columns, c = rest.shape
            pairs = pairs.reshape(b, t, rows, columns, 2, c).transpose(0, 1, 4, 2, 3, 5)
            rest = pairs.reshape(b, 2 * t, rows, columns, c)
        x = jnp.concatenate([alone, rest], axis=1)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return _convolved(x, w, f"{name}.resample.1", (1, 1))


@typed
def averaged(
    past: Past, x: Float[Array, "B T Y X C"], width: int, *, time: int, space: int
) -> Float[Array, "B t y x D"]:
    """The way past the blocks of a level on the way down: means over blocks of time x space x space positions and over
    neighbouring channels, so that `width` are left. The video's first frame has zeros before it."""
    b, t, rows, columns, c = x.shape
    if past.first and t % time:
        x = jnp.pad(x, [(0, 0), (time - t % time, 0), (0, 0), (0, 0), (0, 0)])
        t = x.shape[1]
    x = x.reshape(b, t // time, time, rows // space, space, columns // space, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # channels first: groups of them lie together
    return x.reshape(*x.shape[:4], width, -1).mean(axis=-1)


@typed
def repeated(
    past: Past, x: Float[Array, "B T Y X C"], width: int, *, time: int, space: int
) -> Float[Array, "B t y x D"]:
    """The way past the blocks of a level on the way up: channels become blocks of time x space x space positions of
    `width` channels, each as often as it must."""
    b, t, rows, columns, c = x.shape
    x = jnp.repeat(x, width * time * space * space // c, axis=-1)
    x = x.reshape(b, t, rows, columns, width, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * time, rows * space, columns * space, width)
    return x[:, time - 1 :] if past.first else x
