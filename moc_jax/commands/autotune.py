"""Finds the fastest tilings of attention on this machine's device, and keeps them for later runs.

    python -m moc_jax.commands.autotune --shots 8 --frames 25 --rows 30 --columns 30 --heads 12

Afterwards training and sampling use them by themselves, on such a device, with this version. --out tilings.json writes
a file instead, for --attention.tilings tilings.json. What the file holds of other settings, sizes and devices stays.
Each faster tiling is written when it is found: Ctrl-C keeps the best so far, and the same command (with --out: and
--attention.tilings) continues from there.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from moc_jax.cli import clean_exit, parse
from moc_jax.config import AttentionConfig, MoCConfig
from moc_jax.config.base import Count, Natural, OptionalPath, Range, Seed, Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """What to tune for, and where to keep it."""

    out: OptionalPath = ""
    """The JSON file; where it exists, what is found is added to it; empty: in the user's cache, where runs look."""
    shots: Count = 8
    """Shots of the scene, all as long."""
    frames: Count = 25
    """Frames of tokens per shot: latent frames / model.patch[0]."""
    rows: Count = 30
    """Rows of tokens: latent rows / model.patch[1]."""
    columns: Count = 30
    """Columns of tokens: latent columns / model.patch[2]."""
    caption: Natural = 56
    """Tokens of each caption, the global one included."""
    heads: Count = 12
    """Attention heads; times grow with them, the best tiling hardly changes."""
    head_dim: Count = 128
    """Size of a head."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of q, k and v."""
    trials: Annotated[int, Range(1, 10**4)] = 100
    """The most tilings that are compiled and measured."""
    seed: Seed = 0
    """Of the random q, k and v."""
    moc: MoCConfig = MoCConfig()
    attention: AttentionConfig = AttentionConfig()


def main(argv: Sequence[str]) -> None:
    """Measures, and writes the file."""
    args = parse(Arguments, argv, description=__doc__)

    import jax
    import jax.numpy as jnp

    from moc_jax.attention.api import routed_attention
    from moc_jax.attention.autotune import autotune
    from moc_jax.attention.tilings import Tilings, kept_file, read_tilings
    from moc_jax.files import write_text
    from moc_jax.scene import SceneLengths, SceneShape, chunk_table

    out = pathlib.Path(args.out) if args.out else kept_file()
    attention = routed_attention(args.attention)

    def known() -> Tilings:
        return read_tilings(out, name="out") if out.exists() else Tilings()

    known()  # a file of something else is reported before any work
    captions = args.shots + 1
    shape = SceneShape(
        shots=args.shots,
        frames=args.shots * args.frames,
        rows=args.rows,
        columns=args.columns,
        text_tokens=captions * args.caption,
    )
    lengths = SceneLengths(jnp.full((1, args.shots), args.frames), jnp.full((1, captions), args.caption))
    table = chunk_table(lengths, shape, args.moc.chunk)
    size = 1, shape.tokens, args.heads, args.head_dim
    q, k, v = (jax.random.normal(key, size, args.dtype) for key in jax.random.split(jax.random.key(args.seed), 3))
    backend = attention.backend_for(q, k, v, table, args.moc)
    for tuned in autotune(q, k, v, table, args.moc, backend=backend, trials=args.trials):
        write_text(out, known().updated(tuned).to_json())  # beside what others may have added meanwhile
        print(f"{tuned.milliseconds:.3f} ms with {tuned.tiling}: in {out}", flush=True)


if __name__ == "__main__":
    with clean_exit(NotImplementedError):
        main(sys.argv[1:])
