"""The configs that come with the package: `configs/` of a clone, which a wheel carries as moc_jax/configs."""

import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]
FOLDER = next((f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()), _PACKAGE / "configs")


def shipped_names() -> list[str]:
    """What `--config` takes besides files."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def shipped_or(file: str) -> str:
    """The path of the config that comes with the package under the name `file`, or `file` itself."""
    return str(FOLDER / f"{file}.py") if file in shipped_names() else file
