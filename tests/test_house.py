"""The house's own rules: imports point down, files stay small, the package needs no torch."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEAVES = {"chips", "config", "cuts", "errors", "phases", "reading", "scene", "shapes", "showing"}
UNDER_THE_ENTRY_POINTS = {
    "attention",
    "checkpoint",
    "checkpoint_base",
    "checkpoint_layout",
    "checkpoint_names",
    "codecs",
    "config_json",
    "data",
    "diffusion",
    "documents",
    "stories",
}
UNDER_THE_ENTRY_POINTS |= {
    "cloud",
    "weights",
    "compilation",
    "dialogue",
    "digest",
    "files",
    "models",
    "processes",
    "progress",
    "provenance",
    "sharding",
    "signals",
    "text",
}
# What each module may import, besides itself and the leaves.
ALLOWED = {
    "chips": set(),
    "config": set(),
    "flags": set(),
    "config_json": set(),
    "shapes": set(),
    "reading": set(),
    "showing": set(),
    "scene": set(),
    "cuts": set(),
    "mesh": set(),
    "sharding": {"mesh"},
    "attention": {"sharding", "timing"},
    "models": {"attention", "sharding"},
    "codecs": {"tensor_files"},
    "text": {"tensor_files"},
    "diffusion": set(),
    "documents": set(),
    "stories": {"documents"},
    "progress": set(),
    "timing": set(),
    "phases": set(),
    "dialogue": set(),
    "provenance": set(),
    "data": {"cloud", "codecs", "config_json", "dialogue", "documents", "files", "progress", "provenance"}
    | {"stories", "text"},
    "compilation": {"files"},
    "cli": {"config_json", "signals"},
    "commands": {"cli", "compilation", "flags", "planning", "sampling", "tensor_files", "training"}
    | UNDER_THE_ENTRY_POINTS,
    "cloud": set(),
    "errors": set(),
    "files": set(),
    "signals": set(),
    "processes": set(),
    "watcher": set(),
    "digest": {"sharding"},
    "checkpoint": {"checkpoint_base", "checkpoint_layout", "checkpoint_names", "codecs", "config_json", "digest"}
    | {"files", "models", "processes", "sharding"},
    "checkpoint_base": {"checkpoint_layout", "checkpoint_names", "digest", "models", "public_weights"} | {"sharding"},
    "checkpoint_layout": {"checkpoint_names", "config_json", "digest", "processes", "sharding"},
    "checkpoint_names": set(),
    "tensor_files": {"files"},
    "public_weights": {"files", "models", "sharding", "tensor_files"},
    "weights": {"checkpoint", "cli", "codecs", "files", "models", "public_weights", "sharding", "tensor_files", "text"},
    "training": UNDER_THE_ENTRY_POINTS,
    "planning": {"cli", "flags", "training", *UNDER_THE_ENTRY_POINTS},
    "sampling": UNDER_THE_ENTRY_POINTS,
}


@functools.cache
def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _sources() -> list[pathlib.Path]:
    return sorted((ROOT / "moc_jax").rglob("*.py"))


def _beside(*folders: str) -> list[pathlib.Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _module(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "moc_jax").with_suffix("").parts[0]


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = _module(path)
    if module == "__init__":
        return
    modules = {name.split(".")[1] for name in _imports(path) if name.startswith("moc_jax.")}
    up = modules - {module} - LEAVES - ALLOWED[module]
    allowed = sorted(ALLOWED[module] | LEAVES)
    assert not up, f"{path.relative_to(ROOT)} imports {sorted(up)}; {module} may import {allowed}"


def test_only_their_own_folders_know_models_codecs_and_encoders_by_class():
    """Others have the protocol and what builds one; so a second family changes nothing elsewhere."""
    kinds = {"models", "codecs", "text"}
    for path in _sources():
        if _module(path) in kinds:
            continue
        for name in _imports(path):
            package, *inner = name.split(".")
            if package == "moc_jax" and inner[1:] and inner[0] in kinds:
                where = ROOT.joinpath("moc_jax", *inner)
                module = len(inner) > 2 or where.is_dir() or where.with_suffix(".py").exists()
                assert not module, f"{path.relative_to(ROOT)} imports {name}; import from moc_jax.{inner[0]} alone"


def test_only_checkpoint_imports_orbax_only_cloud_googles_client_and_nobody_torch():
    for path in _sources():
        packages = {name.split(".")[0] for name in _imports(path)}
        assert "torch" not in packages, path
        assert "orbax" not in packages or path.name == "checkpoint.py", path
        assert "google" not in packages or path.name == "cloud.py", path


def _private(tree: ast.AST) -> set[str]:
    """What it takes of jax that has no public name, or none that stays."""
    aliases, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in aliases:
                found.add(f"{aliases[root] or root}.{rest}")
    return {name for name in found if re.match(r"jaxlib|jax\.(core|interpreters|extend)\b|jax\.(\w+\.)*_(?!_)", name)}


@pytest.mark.parametrize(
    "source",
    [
        "import jax._src.core",
        "from jax import core",
        "import jax\njax.core.Tracer",
        "import jaxlib",
        "import jax\njax._src",
        "from jax.experimental import pallas as pl\npl._x",
    ],
)
def test_private_parts_of_jax_are_found(source):
    assert _private(ast.parse(source))


def test_private_parts_of_jax_are_in_one_file():
    """tests/private_jax.py has those of the tests."""
    files = [*_sources(), *_beside("benchmarks", "evidence")]
    touching = {str(path.relative_to(ROOT)): found for path in files if (found := _private(_tree(path)))}
    assert set(touching) == {"moc_jax/processes.py"}, touching


def test_files_stay_small():
    clone = [ROOT / f"{name}.py" for name in ("train", "sample", "prepare", "plan")]
    for path in [*_sources(), *clone]:
        lines = len(path.read_text().splitlines())
        limit = 12 if path in clone else 150 if _module(path) == "commands" else 700 if "pallas" in str(path) else 400
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines; split it (limit {limit})"


def test_functions_stay_short():
    for path in _sources():
        limit = 120 if "pallas" in str(path) else 60
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= limit, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines (limit {limit})"


# One of each: where else a way of reading, writing or showing would be a second one.
ONLY_IN = {
    # what a text says; storyboard.py writes YAML, and the others read what the run's own processes tell each other
    r"json\.loads?": {"reading.py", "processes.py", "watcher.py", "training/due.py", "training/diagnosis.py"},
    r"yaml\.(?!safe_dump)\w+": {"documents.py"},
    r"\w+\.decode\('utf-8-sig'\)": {"reading.py"},
    # files that appear whole
    r"(os\.(replace|rename|renames|fsync)|shutil\.move|tempfile\.mkstemp)": {"files.py"},
    r"\w+\.rename": {"files.py", "checkpoint.py", "training/history.py"},  # the latter two move damaged things aside
    # captions are encoded once, into a store, and a storyboard's own as it is sampled, public weights opened before
    r"build_text_encoder\(.*\)": {"commands/public.py", "data/caption_store.py", "sampling/generate.py"},
    # values and names in messages
    r"reprlib\.\w+|\w+\.encode\('unicode_escape'\)|\w+\.encode\('utf-8', 'backslashreplace'\)": {"showing.py"},
}


@functools.cache
def _calls(path: pathlib.Path) -> list[str]:
    """Every call and every name with a dot, as text."""
    return [ast.unparse(node) for node in ast.walk(_tree(path)) if isinstance(node, ast.Call | ast.Attribute)]


@pytest.mark.parametrize("way", ONLY_IN)
def test_one_of_each(way):
    """Strict reading, atomic writing and showing stand once: see reading.py, documents.py, files.py and showing.py."""
    apart = [ROOT / "benchmarks" / name for name in ("results.py", "report.py")]
    named = {path: path.relative_to(ROOT / "moc_jax").as_posix() for path in _sources()} | {p: p.name for p in apart}
    users = {name for path, name in named.items() if any(re.fullmatch(way, call) for call in _calls(path))}
    assert users <= ONLY_IN[way], f"{sorted(users - ONLY_IN[way])} must use what {sorted(ONLY_IN[way])[0]} offers"
    assert ONLY_IN[way] <= users, f"{sorted(ONLY_IN[way] - users)} need not be named here any more"


def test_unfinished_files_have_their_names_from_one_place():
    for path in _sources():
        texts = [node.value for node in ast.walk(_tree(path)) if isinstance(node, ast.Constant)]
        unfinished = [t for t in texts if isinstance(t, str) and re.fullmatch(r"\S*\.(tmp|part|partial)", t)]
        assert not unfinished or path.name in ("files.py", "workdir.py"), f"{path}: {unfinished}"


def test_only_those_that_own_a_run_take_the_whole_config():
    """All other functions of training and sampling take the settings that they need."""
    owners = {"training": {"loop", "start", "summary"}, "sampling": {"generate", "generation", "preview", "compare"}}
    for module, files in owners.items():
        for path in (ROOT / "moc_jax" / module).glob("*.py"):
            for node in ast.walk(_tree(path)):
                if isinstance(node, ast.arg) and node.annotation is not None and path.stem not in files:
                    assert ast.unparse(node.annotation) != "Config", f"{path.relative_to(ROOT)}, line {node.lineno}"


ANY = 60
"""Lines that mention it; where a real type can stand, Any is none."""


def test_any_stands_on_few_lines():
    lines = [line for path in _sources() for line in path.read_text().splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= ANY, f"{len(lines)} lines say Any; name the type, or `object` where it is not looked into"


def test_importing_changes_no_logger_no_flag_and_no_warning():
    """Who imports a library decides about these; what is needed is set where it is used."""
    calls = re.compile(r"addFilter|setLevel|mark_as_parsed|filterwarnings|simplefilter|basicConfig|jax\.config\.update")
    for path in _sources():
        module = _tree(path)
        at_import = [s for s in module.body if not isinstance(s, ast.FunctionDef | ast.ClassDef)]
        found = [node for s in at_import for node in ast.walk(s) if isinstance(node, ast.Call)]
        assert not [node for node in found if calls.search(ast.unparse(node.func))], path


# What a native reader stumbles over, and what to say instead.
PHRASES = {
    r"no number\b": "NaN, or not a number",
    r"\bg(o|oes|oing|one) on (with|from|at)\b": "resume, continue",
    r"\b(is|are|was|were) told\b": "is reported",
    r"\bsays once\b": "reports once",
    r"\bas it stands\b": "as it is",
    r"\brooms\b|\b(a|the|this|each|every) room\b": "module",
    r"(?<!there )\b(is|are|was|were) no (?!longer|larger|more|less|fewer|later|other)\w": "is not a",
    r"\banew\b": "again",
    r"\bin the place of\b": "in place of, instead of",
    r"\bcan(not|'t) be had\b": "is not available",
    r"\bmade? room\b|\bMake room\b": "free some space",
}


def test_english_is_plain():
    """In the package, its configs, benchmarks and evidence, and in README and docs."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.py"), *ROOT.glob("*.py")]
    sources = [*_sources(), *_beside("benchmarks", "configs", "evidence")]
    found = [
        f"{path.relative_to(ROOT)}:{i}: {match[0]!r}; say {better}"
        for path in [*pages, *sources]
        for phrase, better in PHRASES.items()
        for i, line in enumerate(path.read_text().splitlines(), start=1)
        for match in re.finditer(phrase, line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["long", "slow"])
def test_tests_that_are_listed_are_there(name):
    """Each line of long.txt and slow.txt names one, or a file: a name that is changed here must be changed there."""
    for line in (ROOT / "tests" / f"{name}.txt").read_text().splitlines():
        file, *within = line.split("[")[0].split("::")
        name_of_test = rf"{within[-1]}\(" if within else "test_"
        assert re.search(rf"^ *def {name_of_test}", (ROOT / file).read_text(), re.MULTILINE), line
