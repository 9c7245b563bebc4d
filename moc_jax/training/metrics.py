"""What a run tells: metrics.jsonl, TensorBoard, the progress bar, and the loss curve drawn from the first of them.

metrics.jsonl holds no times, so that an interrupted run's file ends up equal, byte for byte, to an uninterrupted one's.
"""

import json
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from moc_jax.training.closing import closing_all

PEAK_FLOPS = {  # bfloat16 matrix products per second and device, dense, by `device_kind`
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Metrics:
    """The run's log. Only the main process writes; on the others every method does nothing."""

    def __init__(self, workdir: str, *, start: int, steps: int, enabled: bool):
        """Goes on after step `start`: what an interrupted run logged beyond it is dropped."""
        self._enabled, self._bar, self._board, self._file = enabled, None, None, None
        if not enabled:
            return
        from tensorboardX import SummaryWriter  # half a second that --help and other processes need not spend

        folder = epath.Path(workdir)
        path = folder / "metrics.jsonl"
        _truncate(path, start)
        self._file = path.open("a")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its protobuf code
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._bar = tqdm(
            total=steps, initial=start, desc="training", unit="step", dynamic_ncols=True, mininterval=0.5, smoothing=0.1
        )

    def write(self, step: int, values: Mapping[str, Any], *, board: bool = True) -> None:
        """One line of metrics.jsonl, and one point per number in TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if board:
            self.board(step, values)

    def board(self, step: int, values: Mapping[str, Any]) -> None:
        """TensorBoard only: for what differs between two runs of the same command, such as times."""
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.board(step, {f"{name}/{key}": inner for key, inner in value.items()})
            else:
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, **shown: str) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def leave_out(self, seconds: float) -> None:
        """Seconds that just passed and were no step: the bar's rate and time left do not count them."""
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._enabled:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        """Ends the files and the bar."""
        with closing_all() as closes:
            for part in (self._file, self._board, self._bar):
                if part is not None:
                    closes(part.close)


class Clock:
    """Work done per second, leaving out pauses (compilation, validation, previews, checkpoints)."""

    def __init__(self):
        self._since = time.perf_counter()
        self._done: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Counts work, by name."""
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0.0) + amount

    def leave_out(self, seconds: float) -> None:
        """Seconds that just passed and were no work."""
        self._since += seconds

    def rates(self) -> dict[str, float]:
        """Work per second since the last call, by name."""
        now = time.perf_counter()
        seconds, done = max(now - self._since, 1e-9), self._done
        self._since, self._done = now, {}
        return {name: amount / seconds for name, amount in done.items()}


def utilisation(flops_per_second: float, device_kind: str, devices: int) -> float | None:
    """Model FLOPs per second over the devices' peak (MFU); None for a device whose peak is not known."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_second / (peak * devices)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; ends at the first that was cut off."""
    path, rows = epath.Path(path), []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _truncate(path: epath.Path, step: int) -> None:
    """Drops all lines after `step`, all at once or not at all."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    part = path.parent / f"{path.name}.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    part.replace(path)


def draw_loss_curve(path: epath.PathLike, out: epath.PathLike) -> bool:
    """A PNG of the loss over steps, its running mean, and the validation losses; False where there is no step yet."""
    rows = read_metrics(path)
    steps = np.array([row["step"] for row in rows if "loss" in row])
    loss = np.array([row["loss"] for row in rows if "loss" in row])
    if not len(steps):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="#9db8d9", linewidth=0.8, label="loss of each step")
    axes.plot(steps, _running_mean(loss), color="#1f4e9c", linewidth=1.8, label="running mean")
    validation = [(row["step"], row["validation"]["mean"]) for row in rows if "validation" in row]
    if validation:
        axes.plot(*zip(*validation), "o-", color="#d1495b", markersize=4, linewidth=1, label="validation")
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log", xlim=(min(steps[0], 1), steps[-1] + 1))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    with epath.Path(out).open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    return True


def _running_mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run up to each point."""
    width = max(1, len(x) // 20)
    sums = np.cumsum(np.concatenate([[0.0], x]))
    ends = np.arange(1, len(x) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
