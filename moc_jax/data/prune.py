"""What of a cache nothing needs any more: found, and removed."""

import errno
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from moc_jax.data.cache import WAITING, at_work, explained, only_one
from moc_jax.data.manifest import ENCODED, MANIFEST, DataError, Manifest, read_manifest
from moc_jax.data.shards import in_use


def prune(manifest: Manifest) -> Iterator[str]:
    """Removes what no run needs from the cache that `manifest`, of the data as it is now, lies in.

    That are earlier states of this data (prepared folders of the same settings and the same `data.source` and
    `data.validation_source`, which held other files then), prepared folders that this version cannot read, videos'
    shards that no prepared folder names, and frames that wait for nobody. Other data and other settings stay.

    What cannot be read for other reasons, such as a permission, is left alone, and all shards with it: it may need
    them. So is what cannot be removed.

    Yields:
        A line for each thing that was removed, or that was kept, with the reason.

    Raises:
        DataError: another process is preparing in this cache.
    """
    root = manifest.folder.parent
    with explained(root), only_one(root), at_work(root, alone=True):
        needed: set[str] | None = {shard.file for shard in manifest.shards}  # None: not known
        for folder in sorted(path for path in root.iterdir() if path.name != manifest.folder.name):
            why, other = "an earlier state of this data", None
            try:
                if not _is_prepared(folder):
                    continue
                other = read_manifest(folder)
            except (DataError, OSError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if isinstance(cause, OSError) and cause.errno != errno.ENOENT:
                    needed = None
                    yield f"kept {folder} and all shards: it cannot be read ({cause.strerror})"
                    continue
                why = "cannot be read by this version"
            if other is None or (other.settings, other.origin) == (manifest.settings, manifest.origin):
                if not in_use(folder):
                    yield _removed(folder, why)
                    continue
                yield f"kept {folder}: a run is reading it"
            if needed is not None and other is not None:
                needed |= {shard.file for shard in other.shards}
        for shard in sorted((root / ENCODED).glob("??/*.array_record")):
            if needed is not None and shard.relative_to(root).as_posix() not in needed:
                yield _removed(shard, "of a video that no prepared folder names")
                shard.with_suffix(".json").unlink(missing_ok=True)
        for file in sorted((root / WAITING).glob("*")):
            yield _removed(file, "waited for nobody")


def _is_prepared(folder: Path) -> bool:
    """Whether it holds prepared data; raises OSError where the folder can't be read."""
    try:
        return stat.S_ISREG((folder / MANIFEST).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _removed(path: Path, why: str) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        return f"kept {path}: it cannot be removed ({error.strerror})"
    return f"removed {path} ({size / 1e6:,.1f} MB): {why}"
