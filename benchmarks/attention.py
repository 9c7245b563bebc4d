"""How long does one layer's attention take, Mixture of Contexts beside dense attention, on this device?

    python benchmarks/attention.py                                  # 8 shots of 22 500 tokens, chunks of 1 280, k = 5
    python benchmarks/attention.py --shots 2 --frames 4 --heads 2   # small enough for a processor

Random inputs, so random routes: the worst case, since neighbouring queries agree on nothing. Median of `repeats` runs
after one to warm up; `temporary` is what the compiler reserves beyond inputs and outputs. Dense attention is
`jax.nn.dot_product_attention`, by cuDNN on an NVIDIA GPU.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import tyro

from moc_jax.attention.accounting import account
from moc_jax.attention.api import moc_attention, route
from moc_jax.config import ChunkConfig, MoCConfig
from moc_jax.scene import SceneLengths, SceneShape, chunk_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    shots: int = 8
    frames: int = 25
    """Latent frames per shot, of 30 x 30 tokens."""
    caption: int = 56
    """Tokens per caption."""
    moc: MoCConfig = MoCConfig(chunk=ChunkConfig(size=1280), top_k=5)
    heads: int = 12
    head_dim: int = 128
    repeats: int = 5


def main(args: Arguments) -> None:
    """Prints one row per operation."""
    captions = args.shots + 1
    shape = SceneShape(
        shots=args.shots, frames=args.shots * args.frames, rows=30, columns=30, text_tokens=captions * args.caption
    )
    lengths = SceneLengths(jnp.full((1, args.shots), args.frames), jnp.full((1, captions), args.caption))
    table = chunk_table(lengths, shape, args.moc.chunk)
    cost = account(table, args.moc, args.head_dim)
    size = (1, shape.tokens, args.heads, args.head_dim)
    q, k, v, d_out = (jax.random.normal(key, size, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))
    dense_by = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def moc(q, k, v):
        return moc_attention(q, k, v, table, args.moc)

    def dense(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=dense_by)

    def both(forward):
        return lambda q, k, v: jax.vjp(forward, q, k, v)[1](d_out)

    device = jax.devices()[0].device_kind
    print(f"{shape.tokens} tokens, {args.heads} heads of {args.head_dim}, bfloat16, {device}, jax {jax.__version__}")
    print(f"attended pairs bound the speed-up to {cost.flops_dense / cost.flops:.2f}x\n")
    rows = {
        "routing": lambda q, k, v: route(q, k, table, args.moc),
        "MoC forward": moc,
        "MoC forward + backward": both(moc),
        f"dense forward ({dense_by})": dense,
        f"dense forward + backward ({dense_by})": both(dense),
    }
    for name, function in rows.items():
        milliseconds, temporary = _measure(function, (q, k, v), args.repeats)
        print(f"{name:36}{milliseconds:10.1f} ms   temporary {temporary / 2**30:6.2f} GiB", flush=True)


def _measure(function, inputs, repeats: int) -> tuple[float, int]:
    program = jax.jit(function).lower(*inputs).compile()
    jax.block_until_ready(program(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
