"""What a run would need and how fast it would be on chips that you don't have yet: no data and no accelerator needed.

moc-plan --config multi_shot --topology v5p:8x8x4 [--any.nested.field value]

--topology NAME   v5p:4x4x4, v6e:16x16, h200:4, ...; an unknown one lists all
--sample          a scene that is sampled, instead of training
--price X         what a chip costs in an hour: prints the price of 1,000 steps
--compile         compiles the step for that topology and says how far its memory is from the estimate: takes a minute
                  or more, and libtpu, or for GPUs jax's CUDA plugin
--timeout S       seconds for that (default 600)
--json            all figures, for programs
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config, ConfigError
from moc_jax.signals import Signals


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Exits with 0, 2 for a wrong setting or topology, 1 where the step doesn't compile."""
    with clean_exit():
        if {"-h", "--help"} & set(argv):
            print(__doc__)
        own, config = options(argv)
    with contextlib.nullcontext() if signals is None else signals.deferred(line=""), clean_exit():
        import jax

        jax.config.update("jax_platforms", "cpu")  # shapes alone: an accelerator here may be in use
        from moc_jax.planning.compiled import compile_step
        from moc_jax.planning.plan import plan_sampling, plan_training, remedies
        from moc_jax.planning.report import as_json, lines
        from moc_jax.planning.topology import topology

        where = topology(own.topology)
        plan = (plan_sampling if own.sample else plan_training)(config, where)
        others = [] if plan.fits or own.sample else remedies(config, plan)
        shown = {"sample": own.sample, "price": own.price}
        found = as_json(config, plan, others, **shown)
        text = lines(config, plan, others, **shown)
        if own.compile:
            model = dataclasses.replace(config.model, remat=plan.policy)
            made = compile_step(dataclasses.replace(config, model=model), where, dict(plan.sizes), own.timeout)
            found["compiled"] = dataclasses.asdict(made)
            off = plan.held.total / made.total - 1
            text += [
                "",
                f"compiled in {made.seconds:.0f} s: {made.total / 2**30:.2f} GiB; the estimate is {off:+.1%} off",
            ]
            for kind, (count, size) in made.collectives.items():
                text.append(f"  {kind} of {count} arrays a step, {size / 1e9:.3g} GB")
        print(json.dumps(found, indent=1) if own.json else "\n".join(text), flush=True)


def options(argv: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """This program's own options, and the config of all others; raises ConfigError as `load_config`, exits as that."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--topology", default="")
    first.add_argument("--price", type=float, default=0.0)
    first.add_argument("--timeout", type=float, default=600.0)
    for flag in ("sample", "compile", "json"):
        first.add_argument(f"--{flag}", action="store_true")
    try:
        own, rest = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from error
    if own.sample and own.compile:
        raise ConfigError("--compile is for training steps: leave out --sample")
    return own, load_config(rest)
