"""For mkdocs: README.md is the site's first page, its links as they must be from there."""

import pathlib

from mkdocs.structure.files import File, Files

README = pathlib.Path(__file__).parents[1] / "README.md"


def on_files(files: Files, config) -> Files:
    """Adds index.md; called by mkdocs once it knows the pages."""
    files.append(File.generated(config, "index.md", content=README.read_text().replace("](docs/", "](")))
    return files
