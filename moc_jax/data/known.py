"""Prepared data that is known by its fingerprint: read as it is, where nothing may be made or changed."""

from moc_jax.cloud import CloudError
from moc_jax.config import Config
from moc_jax.data.copies import place_of, pull
from moc_jax.data.manifest import MANIFEST, DataError, Manifest, check_settings, read_manifest


def known_data(cfg: Config, fingerprint: str) -> Manifest:
    """The data that a run was trained on, of which a checkpoint says the fingerprint; its videos need not be there.

    Raises:
        DataError: it is not there any more, can't be read, or was prepared under other settings than `cfg`.
    """
    try:
        root = place_of(cfg.data.cache)
        pull(root, deep=False)
        folder = root if (root / MANIFEST).is_file() else root / fingerprint
        pull(folder, deep=False)
    except CloudError as error:
        raise DataError(f"data.cache: {error}") from error
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is None or manifest.fingerprint != fingerprint:
        found = "is not there" if manifest is None else f"holds the data of {manifest.fingerprint}"
        raise DataError(
            f"this run was trained on data {fingerprint}, but {folder.absolute()} {found}; put it back, or start the "
            "run's training again with its own command, which prepares the data from the same videos"
        )
    check_settings(manifest, cfg)
    return manifest
