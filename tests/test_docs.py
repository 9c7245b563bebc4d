"""README and docs keep what they promise: links, anchors, commands, flags, settings, paths, snippets and pictures."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib
import typing

import pytest
import yaml

from moc_jax.cli import load_config, parse
from moc_jax.commands import plan, prepare
from moc_jax.commands.sample import Arguments
from moc_jax.config import Config, DataConfig
from moc_jax.config.base import Settings
from moc_jax.data.captions import load_captions
from moc_jax.planning.topology import topology
from moc_jax.sampling.storyboard import load_storyboard

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))) if path.exists()]
ANCHORED = r"(?m)^(#+) (.+)$"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def _without_code(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def _blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text())


def _inline(page: pathlib.Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _without_code(page.read_text()))]


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@functools.cache
def _anchors(page: pathlib.Path) -> set[str]:
    return {_anchor(heading) for _, heading in re.findall(ANCHORED, _without_code(page.read_text()))}


# ------------------------------------------------------------------------------------------------ links


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in _anchors(target), f"{page.name}: {link}; there are {sorted(_anchors(target))}"
        inside = target.is_relative_to(DOCS) or page.parent == ROOT
        assert inside, f"{page.name}: {link} leaves docs/, which the site does not hold"


@pages
def test_headings_have_one_anchor_on_github_and_on_the_site(page):
    headings = [heading for _, heading in re.findall(ANCHORED, _without_code(page.read_text()))]
    assert len(_anchors(page)) == len(headings), f"{page.name} has a heading twice"
    for heading in headings:  # where the two would differ, links could serve one of them only
        anchor = _anchor(heading)
        assert anchor.isascii(), f"{page.name}: {heading}"
        assert "--" not in anchor, f"{page.name}: {heading}"


def test_the_site_holds_every_page():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.glob("*.md"):
        assert f"{page.name}\n" in config, f"mkdocs.yml names no {page.name} in its nav"
    for name in re.findall(r"[\w/]+\.md\n", config):
        assert name == "index.md\n" or (DOCS / name.strip()).is_file(), name


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# ------------------------------------------------------------------------------------------------ commands


@pages
def test_commands_work(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = [line for block in _blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    ours = r"(python3? -m |make |moc-(train|sample|prepare|plan) |pip )"
    named = [code for code in _inline(page) if re.match(ours, code)]
    for line in [*shown, *named]:
        words = shlex.split(line, comments=True)
        if words:
            _check_command(words, f"{page.name}: {line}")


def _check_command(words: list[str], where: str) -> None:
    program, *rest = words
    if "..." in rest:
        rest = rest[: rest.index("...")]
    match program:
        case "make":
            targets = [word for word in rest if "=" not in word]
            known = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
            assert set(targets) <= set(known), where
        case "python" | "python3":
            assert rest[0] == "-m", where
            _check_module(rest[1], rest[2:], where)
        case "moc-train":
            _parsed(lambda: load_config(rest), where)
        case "moc-prepare":
            _parsed(lambda: prepare.options(rest), where)
        case "moc-plan":
            _parsed(lambda: topology(plan.options(rest)[0].topology), where)
        case "moc-sample":
            complete = "--checkpoint" in rest and "--out" in rest
            _parsed(lambda: parse(Arguments, rest if complete else [*rest, "--checkpoint", "x", "--out", "y"]), where)
        case "pip":
            extras = set(re.findall(r"\w+", "".join(re.findall(r"\.\[(.*?)\]", where))))
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert extras <= set(known), where
        case _ if program.startswith("launch/"):
            assert (ROOT / program).is_file(), where
            assert not rest or re.search(rf"(?m)^  {rest[0]}\)", (ROOT / program).read_text()), where
        case "sbatch":
            assert (ROOT / rest[-1]).is_file(), where
        case "cp":
            shutil.copy(ROOT / rest[0], rest[1])
        case _:
            assert program in ("source", "cd", "git", "export", ".ci/run", "scancel", "xpk"), (
                f"{where}: no such command"
            )


LAUNCH = sorted((ROOT / "launch").iterdir())


@pytest.mark.parametrize("script", LAUNCH, ids=lambda path: path.name)
def test_scripts_that_launch_runs_give_commands_that_work(script):
    """With the settings that they come with; what is the shell's own is bash's and shellcheck's to judge."""
    if script.name == "Dockerfile":
        return
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    if tool := shutil.which("shellcheck"):
        done = subprocess.run([tool, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    defaults = dict(re.findall(r"(?m)^(\w+)=\$\{\1:-(.*?)\}", (ROOT / "launch" / "settings.sh").read_text()))
    defaults |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    code = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    commands = re.findall(r"((?:moc-(?:train|prepare)|python -m benchmarks\.\w+) [^&\n]*)", code)
    assert len(commands) == {"tpu_vm.sh": 3, "xpk.sh": 3, "slurm.sbatch": 2}.get(script.name, 0)
    for command in commands:
        line = re.sub(r"\$\{?(\w+)\}?", lambda found: defaults[found[1]], command).replace('"', "").replace("'", "")
        _check_command(shlex.split(line), f"{script.name}: {line}")


STOPPED = """
trap 'echo saved, the same command resumes from here; exit' TERM
echo on
while :; do sleep 0.1; done
"""


def test_a_run_that_was_stopped_is_a_failure_to_schedulers_one_that_is_done_is_not():
    with contextlib.ExitStack() as stack:

        def start(command: str) -> subprocess.Popen[str]:
            words = ["bash", str(ROOT / "launch" / "until_done.sh"), "bash", "-c", command]
            return stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))

        done, failed, stopped = start("echo done"), start("exit 3"), start(STOPPED)
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "on\n"
        stopped.terminate()
        assert [process.wait(60) for process in (done, failed, stopped)] == [0, 3, 1]


def _parsed(read: typing.Callable, where: str) -> None:
    """Reads a command line as the program would."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            read()
        except SystemExit as end:
            code = end.code
    assert not code, f"{where}: {said.getvalue()}"


@functools.cache
def _names(module: str) -> set[str]:
    """Settings and options that a module's source, and those of this repository that it imports, define."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    found = set()
    for node in ast.walk(ast.parse(pathlib.Path(spec.origin).read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.removeprefix("--"))
    return found


def _check_module(module: str, arguments: list[str], where: str) -> None:
    if module in ("pytest", "pip", "venv") or module.endswith("..."):
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{where}: there is no module {module}"
    module += ".__main__" if spec.submodule_search_locations else ""
    if module == "moc_jax.planning.saving":
        return _parsed(lambda: load_config(arguments), where)
    for word in arguments:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")
            assert {name, name.removeprefix("no_")} & _names(module), f"{where}: {module} has no {word}"


# ------------------------------------------------------------------------------------------------ names


def _settings(kind: type, prefix: str = "") -> set[str]:
    """The dotted names of all fields of a config, sections and leaves."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        found.add(prefix + name)
        inner = [hint, *typing.get_args(hint)]
        for part in inner:
            if isinstance(part, type) and issubclass(part, Settings):
                found |= _settings(part, f"{prefix}{name}.")
    return found


@pages
def test_settings_and_flags_exist(page):
    settings, sample = _settings(Config), set(typing.get_type_hints(Arguments))
    sections = "|".join(sorted(name for name in settings if any(s.startswith(f"{name}.") for s in settings)))
    own = {"config", "preset", "help", "processes", "part", "prune"}
    own |= _names("benchmarks.report") | _names("evidence.run")
    for code in _inline(page):
        if re.fullmatch(rf"(?:{sections})\.[a-z_.]+", code) and not code.endswith((".py", ".md")):
            assert code in settings, f"{page.name}: there is no setting {code}"
        if code.startswith("--"):
            name = re.match(r"--([\w.-]*\w)", code)[1].replace("-", "_")
            assert name in settings | sample | own, f"{page.name}: no program has {code}"


@pages
def test_files_exist(page):
    for code in _inline(page):
        path = code.split("::")[0].removesuffix("/")
        if re.fullmatch(r"(?:moc_jax|configs|tests|docs|benchmarks|launch|\.ci|\.github)/[\w./-]+", path):
            assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


# ------------------------------------------------------------------------------------------------ snippets

_WITH_PYTHON = [
    pytest.param(page, id=page.name, marks=[] if page.parent == ROOT else pytest.mark.long)  # each call compiles anew
    for page in PAGES
    if _blocks(page, "python")
]


@pytest.mark.parametrize("page", _WITH_PYTHON)
def test_python_snippets_run(page):
    """All of a page's, one after another, as a reader would."""
    names: dict = {}
    for block in _blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if page.name == "README.md":
        assert names["out"].shape == names["q"].shape == (1, 1344, 2, 64)
        assert names["picks"].shape == (1, 2, 1344, 3)
        assert (names["picks"][0, 0, -400:] < names["table"].kind.shape[1]).all()


@pages
def test_storyboards_and_captions_are_read(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "rider.png")
    for name in ("finish.mp4", "clip.mp4"):
        (tmp_path / name).write_bytes(b"video")
    for block in _blocks(page, "yaml"):
        file = tmp_path / "clip.yaml"
        file.write_text(block)
        if "seconds:" in block:
            assert len(load_storyboard(file).shots) == len(yaml.safe_load(block)["shots"])
        else:
            assert load_captions(tmp_path / "clip.mp4", DataConfig()).cuts == (3.04,)


# ------------------------------------------------------------------------------------------------ pictures


def test_the_picture_of_the_modules_is_the_package(monkeypatch):
    """Each module is in it, and imports only what lies in lower layers or to its right."""
    monkeypatch.syspath_prepend(DOCS / "pictures")
    layers = importlib.import_module("house").LAYERS
    depth = {module: (i, j) for i, (_, modules) in enumerate(layers) for j, module in enumerate(modules)}
    folder = ROOT / "moc_jax"
    there = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(depth) == there - {"__init__"}, "docs/pictures/house.py: LAYERS and moc_jax/ differ"
    for path in folder.rglob("*.py"):
        module = path.relative_to(folder).with_suffix("").parts[0]
        imports = set(re.findall(r"(?:from|import) moc_jax\.(\w+)", path.read_text()))
        imports = (imports | set(re.findall(r"from moc_jax import (\w+)", path.read_text())) & there) - {module}
        if module != "__init__":
            up = {other for other in imports if depth[other] <= depth[module]}
            assert not up, f"{path.relative_to(ROOT)} imports {up}, which are not below {module} in the picture"


@pytest.mark.long
def test_pictures_are_drawn_from_what_is_there(tmp_path, monkeypatch):
    """`make pictures` would change nothing."""
    monkeypatch.syspath_prepend(DOCS / "pictures")
    importlib.import_module("draw").main(tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn
    for picture in drawn:
        assert picture.read_text() == (DOCS / "pictures" / picture.name).read_text(), f"{picture.name} is stale"
