"""Arrays that take long to make are made once: files named by what they are made of, shared by all processes."""

import contextlib
import fcntl
import hashlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

import moc_jax.codecs
import moc_jax.text
from moc_jax.files import whole_file, whole_folder
from moc_jax.sharding import key_path

Arrays = dict[str, np.ndarray]
SOURCES = "stories.py", "world.py", "footage.py", "video.py", "dataset.py", "exam.py", "measures.py"
"""Files of this package that decide what `kept` makes, beside the codecs and the text encoders."""
_SMALL = 2**20  # bytes of a file that is read at once


def kept(folder: pathlib.Path | None, name: str, parts: object, make: Callable[[pathlib.Path], Arrays]) -> Arrays:
    """What `make` makes of `parts`, whose repr must say all, and of the source as it is now; large arrays stay on the
    disk, and what is read of them is in memory once for all processes.

    One process makes it; others that want it meanwhile wait. `make` is given the folder that will hold the arrays: it
    may write some there itself, as `NAME.npy`, and returns the others. Without a folder nothing is kept.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return _arrays(_filled(pathlib.Path(place), make))
    path = folder / f"{name}-{_digest(parts, _all_sources())}" / "arrays"
    with _locked(path):
        if not path.exists():
            with whole_folder(path) as partial:
                _filled(partial, make)
    return _arrays(path)


def _filled(place: pathlib.Path, make: Callable[[pathlib.Path], Arrays]) -> pathlib.Path:
    for name, array in make(place).items():
        np.save(place / f"{name}.npy", array)
    return place


def _arrays(place: pathlib.Path) -> Arrays:
    files = {path.stem: path for path in sorted(place.glob("*.npy"))}
    return {name: np.load(path, "r" if path.stat().st_size > _SMALL else None) for name, path in files.items()}


def _all_sources() -> list[str | pathlib.Path]:
    packages = [pathlib.Path(of.__path__[0]) for of in (moc_jax.codecs, moc_jax.text)]
    return [*SOURCES, *(path for package in packages for path in sorted(package.glob("*.py")))]


def mapped(folder: pathlib.Path, name: str, parts: object, source: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """As `kept`, but of one source file, and one array that stays on the disk: what is read of it is in memory once for
    all processes."""
    path = folder / f"{name}-{_digest(parts, [source])}.npy"
    with _locked(path):
        if not path.exists():
            with whole_file(path) as partial, partial.open("wb") as file:
                np.save(file, make())
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _digest(parts: object, sources: Sequence[str | pathlib.Path]) -> str:
    digest = hashlib.sha256(repr(parts).encode())
    for source in sources:
        digest.update((pathlib.Path(__file__).parent / source).read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """No other process is in such a block for this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def save_weights(path: pathlib.Path, weights: object, **more: np.ndarray) -> None:
    """Each array of weights, or of another pytree, by its name; and more arrays beside them."""
    arrays = {"/".join(key_path(at)): np.asarray(x) for at, x in jax.tree.leaves_with_path(weights)}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, **more)


def load_weights[T](path: pathlib.Path, like: T) -> T:
    """What `save_weights` wrote of a pytree `like` this.

    Raises:
        FileNotFoundError: there is none.
    """
    with np.load(path, allow_pickle=False) as file:
        return jax.tree.map_with_path(lambda at, _: file["/".join(key_path(at))], like)
