"""`train.profile_steps`: what devices and host do in so many steps, for xprof, TensorBoard's profile plugin."""

import contextlib
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator

import jax
from etils import epath

WARM = 4  # steps that come before, of which the third is timed alone


class Profile:
    """Traces the steps after the first `WARM` of a start; each process writes its own file, all into one folder.

    The folder is tensorboard/plugins/profile/step-<first> in the workdir, where TensorBoard and xprof look for it.
    """

    def __init__(self, steps: int, workdir: str, start: int, between: Callable[[Callable[[int], None], int], None]):
        """`between(action, step)` does something once all steps until then are done, and counts its time as a pause."""
        self._first, self._end, self._between = start + WARM, start + WARM + steps, between
        self._out = epath.Path(workdir) / "tensorboard" / "plugins" / "profile" / f"step-{self._first + 1:08d}"
        self._folder: pathlib.Path | None = None

    def after(self, step: int) -> None:
        """To be called after each step; begins and ends the trace."""
        if self._first == step < self._end:
            self._between(self._begin, step)
        elif step == self._end:
            self.close(step)

    def close(self, step: int = 0) -> None:
        """Ends a trace that has begun, and writes it."""
        if self._folder is not None:
            self._between(self._write, step)

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # which would be most of the file
        with _forgiven():
            folder = pathlib.Path(tempfile.mkdtemp(prefix="moc_jax-profile-"))
            jax.profiler.start_trace(str(folder), profiler_options=options)
            self._folder = folder

    def _write(self, step: int) -> None:
        folder, self._folder = self._folder, None
        assert folder is not None
        with _forgiven():
            jax.profiler.stop_trace()
            self._out.mkdir(parents=True, exist_ok=True)
            for file in folder.rglob("*.xplane.pb"):
                (self._out / f"process-{jax.process_index():05d}.xplane.pb").write_bytes(file.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _forgiven() -> Iterator[None]:
    """A trace that fails, on this process alone, costs no step."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"training continues without train.profile_steps: {error}", stacklevel=2)
