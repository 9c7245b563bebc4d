"""How fast a run is and how much of its time counts: for speed.jsonl and TensorBoard.

    speed/steps_per_second, speed/tokens_per_second    since the line before, pauses left out; tokens without padding
    speed/model_flops_utilisation                      MFU: FLOPs of the model per second over the chips' peak, where
                                                       the chip is known (moc_jax/chips.py). The model's are those of
                                                       its forward pass times three; nothing that is recomputed
    speed/input_wait                                   the share of the same time in which the devices waited for data
    speed/goodput                                      the share of the time since the run's first start that went into
                                                       steps that count

A step counts if the run as it is now has it: what was done after the last checkpoint before a kill, and is done again,
does not. Nor do starts, compilation, validation, previews, checkpoints, waiting for data, or the time in which nothing
ran. Lines hold `unix`, the clock's seconds, and `counted`, those in steps so far; the first, of step 0, has the run's
first start.
"""

import time

from etils import epath

from moc_jax.chips import chip_of
from moc_jax.training.history import read_metrics

FILE, CLOCKS = "speed.jsonl", ("unix", "counted")  # the latter are in the file alone


class Speed:
    """Counts steps and their time, over all starts of a run."""

    def __init__(self, device_kind: str, devices: int, *, begun: float = 0.0) -> None:
        """Of a run on so many devices of this kind, which started `begun` seconds ago."""
        chip = chip_of(device_kind)
        self._peak = None if chip is None else chip.flops * devices
        self._first, self._counted = time.time() - begun, 0.0
        self._since = time.perf_counter()
        self._done: dict[str, float] = {}

    def resume(self, workdir: epath.PathLike) -> bool:
        """Continues what earlier starts wrote, whose lines beyond the last checkpoint are gone by now; if they did."""
        rows = read_metrics(epath.Path(workdir) / FILE)
        if rows:
            self._first = min(self._first, rows[0].get("unix") or self._first)
            self._counted = rows[-1].get("counted") or 0.0
        return bool(rows)

    def add(self, **amounts: float) -> None:
        """Counts a step's work, by name; the time since the last one was its, but for the seconds `waited`."""
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0.0) + amount

    def leave_out(self, seconds: float) -> None:
        """Seconds that just passed without work."""
        self._since += seconds

    def line(self) -> dict[str, float]:
        """What there is to say now; rates are those since the last call, if anything was done."""
        now, wall = time.perf_counter(), time.time()
        seconds, done = max(now - self._since, 1e-9), self._done
        found = {"unix": wall}
        if done:
            waited = done.pop("waited", 0.0)
            self._since, self._done, self._counted = now, {}, self._counted + max(0.0, seconds - waited)
            found |= {f"{name}_per_second": amount / seconds for name, amount in done.items()}
            found["input_wait"] = waited / seconds
            if self._peak is not None and "flops" in done:
                found["model_flops_utilisation"] = done["flops"] / seconds / self._peak
        elapsed = max(wall - self._first, 1e-9)
        return found | {"counted": self._counted, "goodput": min(1.0, self._counted / elapsed)}

    @property
    def begin(self) -> dict[str, float]:
        """The line of step 0."""
        return {"unix": self._first, "counted": 0.0}
