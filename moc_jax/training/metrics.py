"""What a run reports: metrics.jsonl, speed.jsonl, TensorBoard, progress, and the loss curve drawn from the first.

metrics.jsonl holds no times, so that an interrupted run's file ends up equal, byte for byte, to an uninterrupted one's.
Times are in speed.jsonl (training/speed.py).
"""

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from moc_jax.files import whole_file
from moc_jax.progress import Progress
from moc_jax.training.closing import closing_all
from moc_jax.training.history import Log, Row, clear_the_way, keep_until, read_metrics, set_apart
from moc_jax.training.speed import CLOCKS, Speed
from moc_jax.training.speed import FILE as SPEED
from moc_jax.training.tensorboard import EventFile

__all__ = ["Metrics", "draw_loss_curve", "read_metrics"]

Values = Mapping[str, "float | Mapping[str, float]"]
"""Numbers by name, nested once at most."""


class Metrics:
    """The run's log. Only the main process writes; on the others every method does nothing."""

    def __init__(self, workdir: str, *, start: int, steps: int, speed: Speed, enabled: bool):
        """Resumes after step `start`: what an interrupted run logged beyond it is dropped.

        `speed` is new, and continues what is there.
        """
        self._enabled, self._board, self._file, self._times, self._speed = enabled, None, None, None, speed
        self._progress = Progress("training", total=steps, unit="step", done=start, enabled=enabled)
        if not enabled:
            return
        folder = epath.Path(workdir)
        path = folder / "metrics.jsonl"
        clear_the_way(folder)
        if not start:
            set_apart(folder)
        for each in (path, folder / SPEED):
            keep_until(each, start)
        self._file, self._times = Log(path), Log(folder / SPEED)
        if not speed.resume(folder):
            self._write_times(0, speed.begin)
            self._times.keep()
        try:
            self._board = EventFile(folder / "tensorboard", purge_step=start + 1 if start else None)
        except OSError as error:
            warnings.warn(f"nothing is written to TensorBoard: {error}", UserWarning, stacklevel=2)

    def write(self, step: int, values: Values, *, board: bool = True) -> None:
        """One line of metrics.jsonl (null where a number is not finite), and one point per number in TensorBoard."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **_finite(values)}, allow_nan=False) + "\n")
        if board:
            self.board(step, values)

    def count(self, **amounts: float) -> None:
        """A step's work, by name."""
        self._speed.add(**amounts)

    def times(self, step: int) -> Mapping[str, float]:
        """A line of speed.jsonl, and the same in TensorBoard: what differs between two runs of the same command."""
        values = self._speed.line()
        self._write_times(step, values)
        self.board(step, {f"speed/{name}": value for name, value in values.items() if name not in CLOCKS})
        return values

    def _write_times(self, step: int, values: Values) -> None:
        if self._times is not None:
            self._times.write(json.dumps({"step": step, **_finite(values)}, allow_nan=False) + "\n")

    def board(self, step: int, values: Values) -> None:
        """TensorBoard only."""
        if self._board is None:
            return
        try:
            for name, value in _flat(values):
                self._board.add(name, value, step)
            self._board.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = None
            warnings.warn(f"nothing more is written to TensorBoard: {error}", UserWarning, stacklevel=2)

    def keep(self) -> None:
        """Before a checkpoint is saved, so that a run which resumes from it finds all lines up to there.

        A log that can't be written stops no run: its lines are held, and a warning says so.
        """
        for log in (self._file, self._times):
            try:
                if log is not None:
                    log.keep()
            except Exception as error:  # of a bucket, anything
                warnings.warn(f"a log can't be written, and its lines are held until that works: {error}", stacklevel=2)

    def progress(self, step: int, **shown: str) -> None:
        """Shows that `step` is done, and how it went."""
        self._progress.reach(step, **shown)

    def leave_out(self, seconds: float) -> None:
        """Seconds that just passed and were not spent in a step: no rate and no time left counts them."""
        self._speed.leave_out(seconds)
        self._progress.leave_out(seconds)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._enabled:
            self._progress.say(text)

    def close(self) -> None:
        """Ends the files and the progress."""
        with closing_all() as closes:
            for part in (self._file, self._times, self._board, self._progress):
                if part is not None:
                    closes(part.close)


def _flat(values: Values) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _finite(values: Values) -> Row:
    """JSON has no NaN and no infinity."""
    return {
        name: _finite(value) if isinstance(value, Mapping) else value if math.isfinite(value) else None
        for name, value in values.items()
    }


def draw_loss_curve(path: epath.PathLike, out: epath.PathLike) -> bool:
    """A PNG of the loss over steps, its running mean, and the validation losses; False where there is no step yet.

    It comes after all that matters: where it can't be read or written, a warning says so, and False is returned.
    """
    try:
        png = _loss_curve(read_metrics(path))
        if png:
            with whole_file(out) as partial:
                partial.write_bytes(png)
        return bool(png)
    except OSError as error:
        warnings.warn(f"the loss curve {out} could not be drawn: {error}", stacklevel=2)
        return False


def _loss_curve(rows: list[Row]) -> bytes:
    points = [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]
    if not points:
        return b""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, loss = np.array(points, float).T
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="#9db8d9", linewidth=0.8, label="loss of each step")
    axes.plot(steps, _running_mean(loss), color="#1f4e9c", linewidth=1.8, label="running mean")
    found = [(row["step"], row["validation"].get("mean")) for row in rows if isinstance(row.get("validation"), dict)]
    validation = [(step, mean) for step, mean in found if mean is not None]
    if validation:
        axes.plot(*zip(*validation), "o-", color="#d1495b", markersize=4, linewidth=1, label="validation")
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log", xlim=(min(steps.min(), 1), steps.max() + 1))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _running_mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last twentieth of the run up to each point."""
    width = max(1, len(x) // 20)
    sums = np.cumsum(np.concatenate([[0.0], x]))
    ends = np.arange(1, len(x) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
