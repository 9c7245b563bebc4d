"""`import moc_jax` is the library: lazy, light, and typed."""

import ast
import pathlib
import subprocess
import sys

import pytest

import moc_jax

PACKAGE = pathlib.Path(moc_jax.__file__).parent
PREAMBLE = """
import sys

class OnlyJax:
    '''As where jax alone is installed, with what it needs, jaxtyping and beartype.'''

    def find_spec(self, name, *_):
        if name.partition(".")[0] in BARRED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BARRED = {
    *("flax", "optax", "orbax", "grain", "array_record", "einops", "tyro", "yaml", "av", "scenedetect", "cv2", "PIL"),
    *("matplotlib", "tensorboardX", "tqdm", "tensorstore", "etils"),
}
sys.meta_path.insert(0, OnlyJax())
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention_needs_jax_alone():
    """And the command line's settings not even that."""
    code = """
import moc_jax
assert "jax" not in sys.modules
moc_jax.MoCConfig, moc_jax.ChunkConfig
assert "jax" not in sys.modules
import jax, numpy as np
def use(lengths, q):
    table, order = moc_jax.chunk_table_from(lengths, tokens=12, text_tokens=0, max_chunk=4)
    cfg = moc_jax.MoCConfig(top_k=1)
    return moc_jax.moc_attention(q, q, q, table, cfg), moc_jax.route(q, q, table, cfg)
out, routes = jax.eval_shape(use, np.array([[4, 4, 4]]), np.ones((1, 12, 1, 8), np.float32))
assert (out.shape, routes.shape) == ((1, 12, 1, 8), (1, 1, 12, 1))
for name in moc_jax.__all__:
    getattr(moc_jax, name)
from moc_jax.attention import accounting
print(sorted(BARRED & set(sys.modules)))
"""
    assert run(code) == "[]\n"


def test_every_name_is_there_and_typed():
    """Type checkers read the imports under TYPE_CHECKING, which must name what `__all__` does, from where it is."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "typing.TYPE_CHECKING"
    )
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert {*typed, "__version__"} == set(moc_jax.__all__)
    for name, module in typed.items():
        assert getattr(moc_jax, name) is getattr(sys.modules[module], name)
    assert set(moc_jax.__all__) <= set(dir(moc_jax))
    assert (PACKAGE / "py.typed").is_file()


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'moc_jax' has no attribute 'moc_atention'"):
        moc_jax.moc_atention  # noqa: B018


def test_another_programs_errors_are_its_own(tmp_path):
    """Only `python -m moc_jax...` changes how errors are shown."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import moc_jax\n")
    (tmp_path / "other" / "program.py").write_text("1 / 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "other.program"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
        timeout=60,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
