"""Private parts of jax: those that tests touch are there, and nobody else touches any."""

import pathlib

import pytest

from tests import private_jax

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", private_jax.here())
def test_it_is_still_there(name):
    part = private_jax.PARTS[name]
    assert part.value is not None
    assert not part.missing, f"jax._src.{part.module}.{part.attribute} has no {part.missing} any more. {part.reason}"


@pytest.mark.parametrize("folder", ["moc_jax", "tests", "benchmarks"])
def test_at_most_one_file_touches_any(folder):
    files = [path for path in (ROOT / folder).rglob("*.py") if "jax._src" in path.read_text()]
    files = [path.relative_to(ROOT) for path in files if path.name not in ("test_private_jax.py", "test_house.py")]
    allowed = {"moc_jax": "processes.py", "tests": "private_jax.py"}
    assert {path.name for path in files} <= {allowed.get(folder)}, files
