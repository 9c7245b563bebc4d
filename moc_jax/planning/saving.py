"""What a save takes of each host, within the seconds between a preemption's notice and the end.

    python -m moc_jax.planning.saving --config multi_shot --preset 3b

Hosts that hold a part of the weights which no other has before them write it, each its own: with fsdp over all of them,
all write alike; with copies of the weights (mesh.data), those of the first copy.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax

from moc_jax.cli import clean_exit, load_config
from moc_jax.config import Config
from moc_jax.training.state import abstract_state

GRACES = {"a spot TPU VM or a preempted GPU VM": 30.0, "GKE with 120 s, SLURM with --signal 120 s ahead": 120.0}
RATES = (0.25e9, 1e9, 4e9)  # bytes per second and host: a shared disk, a bucket, several streams to a bucket
HOSTS = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint of a run, written by `writers` hosts alike."""

    bytes: int
    """Of weights, optimizer and average."""
    writers: int

    @property
    def per_host(self) -> float:
        """Bytes that each of the writers has."""
        return self.bytes / self.writers

    def rate(self, grace: float) -> float:
        """Bytes per second that each writer needs, to be done within `grace` seconds."""
        return self.per_host / grace

    def least_writers(self, rate: float, grace: float) -> int:
        """As many as write it within `grace` seconds at `rate` bytes per second each."""
        return math.ceil(self.bytes / (rate * grace))


def checkpoint_bytes(cfg: Config) -> int:
    """What a checkpoint of this run holds."""
    leaves = jax.tree.leaves(abstract_state(cfg.model, cfg.optimizer, cfg.train).items())
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def save_of(cfg: Config, hosts: int, copies: int = 1) -> Save:
    """The save of a run on `hosts` that hold `copies` of its weights together."""
    return Save(bytes=checkpoint_bytes(cfg), writers=max(1, hosts // copies))


def table(cfg: Config) -> list[str]:
    """Markdown: hosts down, what each must write; then the least hosts by rate and grace."""
    size = checkpoint_bytes(cfg)
    saves = [Save(bytes=size, writers=hosts) for hosts in HOSTS]
    lines = [f"A checkpoint holds {size / 1e9:.1f} GB.", "", "| hosts that write | GB each |"]
    lines[-1] += "".join(f" GB/s each, {grace:g} s |" for grace in GRACES.values())
    lines.append("|--:|--:|" + "--:|" * len(GRACES))
    for save in saves:
        rates = "".join(f" {save.rate(grace) / 1e9:.3g} |" for grace in GRACES.values())
        lines.append(f"| {save.writers} | {save.per_host / 1e9:.3g} |{rates}")
    lines += ["", "| least hosts |" + "".join(f" {rate / 1e9:g} GB/s each |" for rate in RATES)]
    lines.append("|---|" + "--:|" * len(RATES))
    for name, grace in GRACES.items():
        least = "".join(f" {saves[0].least_writers(rate, grace)} |" for rate in RATES)
        lines.append(f"| {name}: {grace:g} s |{least}")
    return lines


def main(argv: Sequence[str]) -> None:
    """The command line."""
    with clean_exit():
        print("\n".join(table(load_config(argv))))


if __name__ == "__main__":
    main(sys.argv[1:])
