"""What earlier starts of a run left in its workdir: its logs are read, and what is in a file's way is moved aside.

Nothing here stops a run, whose checkpoints may well be whole, and nothing is thrown away: what can't be read, or is not
what belongs in its place, gets another name beside it, and a warning gives both.
"""

import contextlib
import io
import math
import os
import pathlib
import shutil
import stat
import warnings
from typing import Any

from etils import epath

from moc_jax.files import is_address, whole_file, write_text
from moc_jax.reading import parse_json
from moc_jax.training.closing import closing_all

_LONGEST = 1 << 20  # bytes; a line of ours has some hundred
Row = dict[str, Any]
"""A line of metrics.jsonl or speed.jsonl: its step, and numbers by name, nested once at most."""

_FILES, _FOLDERS = ("loss.png", "metrics.jsonl", "speed.jsonl"), ("tensorboard", "previews")


def read_metrics(path: epath.PathLike) -> list[Row]:
    """The lines of a log that can be read, in their order; none where there is no such file."""
    return [row for row in map(_row, _lines(epath.Path(path))) if row is not None]


def keep_until(path: epath.Path, step: int) -> None:
    """Drops the lines of a log beyond `step`, all at once or not at all; the others stay, byte for byte.

    Lines that can't be read are moved to a file beside it, which a warning names. A last line that was cut off is the
    trace of a run that was killed while it wrote, beyond its last checkpoint.
    """
    kept, damaged = [], []
    *lines, last = _lines(path)
    if _row(last) is not None or not last.startswith(b"{"):
        lines.append(last)
    for line in lines:
        row = _row(line)
        if row is None:
            damaged += [line] if line.strip() else []
        elif row["step"] <= step:
            kept.append(line)
    if damaged:
        aside = _aside(path)
        with whole_file(aside) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in damaged))
        warnings.warn(
            f"{len(damaged)} line(s) of {path} can't be read and were moved to {aside.name}; all others are kept",
            stacklevel=3,
        )
    with whole_file(path) as partial:
        partial.write_bytes(b"".join(line + b"\n" for line in kept))


def set_apart(workdir: epath.Path) -> None:
    """A run begins at step 0 where an earlier one got further: what it would replace of that stays under another name.

    Files are copied, since the first line of speed.jsonl stays where it is; previews move, unless in a bucket.
    """
    logs = [workdir / name for name in ("metrics.jsonl", "speed.jsonl")]
    last = max((row["step"] for log in logs for row in read_metrics(log)), default=0)
    if not last:
        return
    kept = []
    for path in [path for path in (*logs, workdir / "loss.png") if path.exists()]:
        kept.append(_aside(path, "before"))
        with whole_file(kept[-1]) as partial:
            partial.write_bytes(path.read_bytes())
    if (previews := workdir / "previews").exists() and not is_address(workdir):
        kept.append(_aside(previews, "before"))
        previews.rename(kept[-1])
    warnings.warn(
        f"{workdir} has the log of a run up to step {last}, but no checkpoint of it: this one begins at step 0. What "
        f"was there stays as {', '.join(path.name for path in kept)}. If its checkpoints were moved, stop, put them "
        "back and start again",
        stacklevel=3,
    )


class Log:
    """metrics.jsonl or speed.jsonl, open for lines at its end.

    Nothing can be added to what lies in a bucket: there the lines are held here until `keep`, which writes them all. So
    are those that a disk does not take, which costs no step before it would cost the log.
    """

    def __init__(self, path: epath.Path) -> None:
        """Raises OSError where the file can't be opened."""
        self._path, self._left = path, b""
        self._file = None if is_address(path) else io.FileIO(path, "ab")
        self._whole = path.read_bytes() if self._file is None and path.exists() else b""

    def write(self, line: str) -> None:
        """Adds it; on a disk it can be read at once."""
        self._left += line.encode()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.keep()

    def keep(self) -> None:
        """What was written stays, from now on, however the process ends; raises OSError where it can't."""
        while self._file is not None and self._left:
            self._left = self._left[self._file.write(self._left) :]
        if self._left:
            write_text(self._path, (self._whole + self._left).decode())
            self._whole, self._left = self._whole + self._left, b""

    def close(self) -> None:
        """Ends the file."""
        with closing_all() as closes:
            if self._file is not None:
                closes(self._file.close)
            closes(self.keep)


def clear_the_way(workdir: epath.Path) -> None:
    """Moves aside what lies where a run writes and can't be written: a folder in a file's place, a file in a folder's.

    Links are never written through: that of a log becomes a copy, others are moved aside.
    """
    if is_address(workdir):  # a bucket holds objects only: nothing is in the way of anything
        return
    for name in (*_FILES, *_FOLDERS):
        path = pathlib.Path(workdir / name)
        problem = _problem(path, folder=name in _FOLDERS) if os.path.lexists(path) else ""
        if not problem:
            continue
        aside = pathlib.Path(_aside(epath.Path(path)))
        path.rename(aside)
        kept = name.endswith(".jsonl") and aside.is_symlink() and aside.is_file() and os.access(aside, os.R_OK)
        if kept:
            shutil.copyfile(aside, path)
        warnings.warn(
            f"{path} {problem}; it was moved to {aside.name}" + (", and its lines are kept" if kept else ""),
            stacklevel=3,
        )


def _problem(path: pathlib.Path, *, folder: bool) -> str:
    """Why `path`, which exists, can't be what belongs there; empty where it can."""
    if folder:
        return "" if path.is_dir() else "is not a folder"
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}"
    if path.is_dir():
        return "is a folder"
    if not stat.S_ISREG(path.lstat().st_mode):
        return "is not a file"
    try:
        path.open("rb").close()
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    return ""


def _aside(path: epath.Path, why: str = "damaged") -> epath.Path:
    """`<name>.<why>-1` beside `path`, or the next number that is free."""
    taken, number = {other.name for other in path.parent.iterdir()}, 1
    while (name := f"{path.name}.{why}-{number}") in taken:
        number += 1
    return path.parent / name


def _lines(path: epath.Path) -> list[bytes]:
    """What lies between newlines; at least one, the last being what no newline follows."""
    return path.read_bytes().split(b"\n") if path.exists() else [b""]


def _row(line: bytes) -> Row | None:
    """A line as `Metrics.write` writes it: a step, and numbers by name, nested once at most. None: it is another."""
    if len(line) > _LONGEST:
        return None
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
        return None
    inner = [number for value in row.values() if isinstance(value, dict) for number in value.values()]
    return row if all(map(_is_number, inner + [v for v in row.values() if not isinstance(v, dict)])) else None


def _is_number(value: object) -> bool:
    """A finite one, or null, which stands for one that was not."""
    try:
        return value is None or (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
    except OverflowError:  # a whole number beyond every float
        return False
