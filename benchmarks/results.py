"""Results on disk: one JSON file per script and card, whose entries are replaced one by one.

{"card": ..., "entries": {name: {"command", "date", "versions", ...what was measured}}}

What was compiled for a chip that isn't there says "chip" instead of "card".
"""

import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import re
import shutil
import subprocess
from typing import Any

import jax

from moc_jax.files import write_text
from moc_jax.reading import parse_json

FOLDER = pathlib.Path(__file__).parent / "results"
_PACKAGES = re.compile(r"jax|jaxlib|libtpu|jax-cuda\d+-pjrt|nvidia-cudnn-cu\d+|nvidia-cuda-runtime(-cu\d+)?")


def store(
    folder: pathlib.Path, script: str, name: str, command: str, entry: dict[str, Any], chip: str | None = None
) -> pathlib.Path:
    """Puts `entry` into the file of this script and this machine's card, or `chip`, keeping the others; returns it."""
    device = {"card": jax.devices()[0].device_kind} if chip is None else {"chip": chip}
    (called,) = device.values()
    path = folder / f"{script}-{re.sub(r'[^a-z0-9]+', '-', called.lower())}.json"
    entries = parse_json(path.read_bytes())["entries"] if path.exists() else {}
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    entries[name] = {"command": command, "date": date, "versions": versions(), **entry}
    write_text(path, json.dumps({**device, "entries": dict(sorted(entries.items()))}, indent=1) + "\n")
    return path


def load(folder: pathlib.Path, script: str) -> list[dict[str, Any]]:
    """All files of a script, by card or chip."""
    return [parse_json(path.read_bytes()) for path in sorted(folder.glob(f"{script}-*.json"))]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if _PACKAGES.fullmatch(name.lower()):
            found[name.lower()] = distribution.version
    return dict(sorted(found.items())) | _driver()


def _driver() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None or jax.default_backend() != "gpu":
        return {}
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    return {"driver": answer.stdout.split("\n")[0].strip()} if answer.returncode == 0 else {}
