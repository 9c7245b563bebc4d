"""How far umT5's encoder is from transformers' UMT5EncoderModel: `python -m tests.parity.umt5_figures` prints it.

make_umt5.py and make_tokens.py wrote what is compared with; here no torch is needed.
"""

import json
import lzma
import pathlib
import tempfile

import numpy as np

from moc_jax.config import Umt5Config
from moc_jax.text import build_text_encoder
from moc_jax.text.umt5.names import Sizes, public_name, shapes_of
from moc_jax.text.umt5.tokens import Tokenizer
from tests.parity.numbers import relative, weight
from tests.parity.umt5_cases import DEPTH, DIM, HEAD_DIM, HEADS, KEPT, MLP_DIM, VOCABULARY, ids, real
from tests.weights.folders import write_tensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
NARROW = Sizes(VOCABULARY, DIM, HEADS, HEADS * HEAD_DIM, MLP_DIM, DEPTH)


def arrays(spelling=0, sizes=NARROW):
    """The narrow encoder's tensors, by transformers' names (0) or the Wan team's (1)."""
    return {
        public_name(name, spelling): weight("umt5", public_name(name, 0), shape)
        for name, shape in shapes_of(sizes).items()
    }


def write(folder, named):
    """A folder as transformers has it."""
    write_tensors(folder / "model.safetensors", named)
    return folder


def write_tokenizer(folder, *, by_bytes=True):
    """Its spiece.model, and what a tokenizer.json beside it says of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(lzma.decompress((GOLDEN / "spiece.model.xz").read_bytes()))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "byte_fallback": by_bytes}}))
    return folder


def encoder_in(folder, **settings):
    """The narrow encoder, in float32 unless said otherwise."""
    return build_text_encoder(Umt5Config(weights=str(folder), **{"dim": DIM, "dtype": "float32", **settings}))


def error(encoder):
    """Relative, and the largest."""
    rows = encoder._encoded(ids(), real())[real()].reshape(-1)
    mine, golden = rows[np.linspace(0, rows.size - 1, KEPT).astype(int)], np.load(GOLDEN / "umt5.npz")["rows"]
    return relative(mine, golden), np.abs(mine - golden).max()


def prompts():
    """With ids by bytes, and without."""
    tree = json.loads(lzma.decompress((GOLDEN / "prompts.json.xz").read_bytes()))
    return tree["prompts"], {True: tree["by_bytes"], False: tree["unknown"]}


def differing(by_bytes):
    """Prompts whose ids differ from those of transformers, and all."""
    texts, golden = prompts()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokenizer(write_tokenizer(pathlib.Path(folder), by_bytes=by_bytes) / "spiece.model")
        return [text for text, wanted in zip(texts, golden[by_bytes], strict=True) if tokens(text) != wanted], texts


def main():
    """The encoder both ways, and the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(write(pathlib.Path(folder), arrays()))
        for hold in ("devices", "layers"):
            mean, most = error(encoder_in(folder, hold=hold))
            print(f"| umT5's encoder, {hold} | {mean:.1e} | {most:.1e} |", flush=True)
    for by_bytes in (True, False):
        wrong, texts = differing(by_bytes)
        print(f"| tokenizer, {'bytes' if by_bytes else 'unknown'} | {len(wrong)} of {len(texts)} prompts differ |")


if __name__ == "__main__":
    main()
