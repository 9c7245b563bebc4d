"""Writes what transformers' UMT5EncoderModel computes: `python -m tests.parity.make_umt5`, in make_wan.py's
environment."""

import hashlib
import pathlib

import numpy as np
import torch
import transformers
from transformers import UMT5Config, UMT5EncoderModel

from tests.parity.numbers import weight
from tests.parity.umt5_cases import DEPTH, DIM, HEAD_DIM, HEADS, KEPT, MLP_DIM, VOCABULARY, ids, real

GOLDEN = pathlib.Path(__file__).parent / "golden"
NARROW = {
    "vocab_size": VOCABULARY,
    "d_model": DIM,
    "d_kv": HEAD_DIM,
    "num_heads": HEADS,
    "d_ff": MLP_DIM,
    "num_layers": DEPTH,
}
XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24}


def encoder(sizes: dict[str, int]) -> UMT5EncoderModel:
    """One of these sizes."""
    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


def main() -> None:
    """The narrow one's output, and names and shapes at full size."""
    built = encoder(NARROW)
    assert built.shared.weight is built.encoder.embed_tokens.weight
    state = {key: torch.from_numpy(weight("umt5", _one(key), tuple(x.shape))) for key, x in built.state_dict().items()}
    built.load_state_dict(state, strict=True)
    with torch.no_grad():
        mask = torch.from_numpy(real())
        out = built(input_ids=torch.from_numpy(ids()).long(), attention_mask=mask.long()).last_hidden_state[mask]
    flat = out.numpy().reshape(-1)
    with torch.device("meta"):
        full = encoder(XXL).state_dict()
    lines = sorted(f"{key} {tuple(x.shape)}" for key, x in full.items() if key == _one(key))
    np.savez_compressed(
        GOLDEN / "umt5.npz",
        rows=flat[np.linspace(0, flat.size - 1, KEPT).astype(int)],
        listing=np.array(hashlib.sha256("\n".join(lines).encode()).hexdigest()),
    )
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(lines)} tensors")


def _one(key: str) -> str:
    """The table has two names."""
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key


if __name__ == "__main__":
    main()
