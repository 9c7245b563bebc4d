"""The house's own rules: imports point down, files stay small, the package needs no torch."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEAVES = {"config", "shapes", "scene", "cuts"}
UNDER_THE_ENTRY_POINTS = {
    "attention",
    "checkpoint",
    "codecs",
    "config_json",
    "data",
    "diffusion",
    "documents",
    "errors",
}
UNDER_THE_ENTRY_POINTS |= {"files", "models", "processes", "progress", "sharding", "signals", "text"}
# What each room may import, besides itself and the leaves.
ALLOWED = {
    "config": set(),
    "config_json": set(),
    "shapes": set(),
    "scene": set(),
    "cuts": set(),
    "sharding": set(),
    "attention": set(),
    "models": {"attention", "sharding"},
    "codecs": set(),
    "text": set(),
    "diffusion": set(),
    "documents": set(),
    "progress": set(),
    "data": {"codecs", "config_json", "documents", "files", "progress", "text"},
    "compilation": {"files"},
    "cli": {"config_json", "signals"},
    "commands": {"cli", "compilation", "sampling", "training", *UNDER_THE_ENTRY_POINTS},
    "errors": set(),
    "files": set(),
    "signals": set(),
    "processes": {"errors"},
    "watcher": set(),
    "digest": {"sharding"},
    "checkpoint": {"checkpoint_layout", "codecs", "config_json", "digest", "errors", "models", "processes", "sharding"},
    "checkpoint_layout": {"config_json", "digest", "processes", "sharding"},
    "training": UNDER_THE_ENTRY_POINTS,
    "sampling": UNDER_THE_ENTRY_POINTS,
}


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _sources() -> list[pathlib.Path]:
    return sorted((ROOT / "moc_jax").rglob("*.py"))


def _room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "moc_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = _room(path)
    if room == "__init__":
        return
    rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("moc_jax.")}
    up = rooms - {room} - LEAVES - ALLOWED[room]
    assert not up, f"{path.relative_to(ROOT)} imports {sorted(up)}; {room} may import {sorted(ALLOWED[room] | LEAVES)}"


def test_only_checkpoint_imports_orbax_and_nobody_imports_torch():
    for path in _sources():
        packages = {name.split(".")[0] for name in _imports(path)}
        assert "torch" not in packages, path
        assert "orbax" not in packages or path.name == "checkpoint.py", path


def test_files_stay_small():
    clone = [ROOT / "train.py", ROOT / "sample.py"]
    for path in [*_sources(), *clone]:
        lines = len(path.read_text().splitlines())
        limit = 12 if path in clone else 150 if _room(path) == "commands" else 700 if "pallas" in str(path) else 400
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines; split it (limit {limit})"


def test_functions_stay_short():
    for path in _sources():
        limit = 120 if "pallas" in str(path) else 60
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= limit, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines (limit {limit})"
