"""Weights that are downloaded, not trained here: a config, and so a checkpoint, says which they are and holds none."""

import dataclasses
import hashlib
import re
from pathlib import Path

from moc_jax.config.base import ConfigError, Settings, check, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(Settings, at="reference"):
    """What a file of weights is, wherever it lies. A field of the configs of codecs and encoders that need one."""

    name: str
    """Who made it and what it is called: `Wan-AI/Wan2.1-VAE`."""
    version: str
    """Which of its versions."""
    sha256: str
    """Of the file, 64 hexadecimal digits."""

    def check_together(self):
        check(
            re.fullmatch("[0-9a-f]{64}", self.sha256) is not None,
            f"{self._prefix}sha256 is {shown(self.sha256)}; it must be 64 hexadecimal digits in lower case",
        )

    def check_file(self, file: Path, setting: str) -> None:
        """Reads `file`, which was downloaded for `setting` (`codec.weights`), and compares.

        Raises:
            ConfigError: it is another file, or can't be read.
        """
        wanted = f"{setting} is {self.name}, version {self.version}"
        try:
            with file.open("rb") as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"{wanted}, but {file} can't be read ({why}); download it there") from error
        check(
            found == self.sha256,
            f"{wanted}, with SHA-256 {self.sha256[:12]}…, but that of {file} is {found[:12]}…; download "
            "that version again",
        )
