"""Writes what diffusers' WanTransformer3DModel computes: `python -m tests.parity.make_wan`, in its own environment.

    python3 -m venv /tmp/parity && /tmp/parity/bin/pip install torch diffusers transformers accelerate
    /tmp/parity/bin/python -m tests.parity.make_wan

Weights are random (numbers.py); nothing is downloaded. What is written, golden/*.npz, is what the tests compare with.
"""

import collections
import hashlib
import pathlib

import diffusers
import numpy as np
import torch
from diffusers import WanTransformer3DModel

from tests.parity.numbers import numbers, sampled, weight
from tests.parity.wan_cases import BATCH, CASES, COLUMNS, FRAMES, FULL_SIZE, PROMPTS, ROWS, TEXT_ROWS, Case

GOLDEN = pathlib.Path(__file__).parent / "golden"


def network(case: Case, model: str) -> WanTransformer3DModel:
    """The model with its weights."""
    built = WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        in_channels=case.channels + case.condition,
        out_channels=case.channels,
        text_dim=case.text_dim,
        ffn_dim=case.mlp_dim,
        num_layers=case.depth,
    ).float()
    state = {name: torch.from_numpy(weight(model, name, tuple(x.shape))) for name, x in built.state_dict().items()}
    built.load_state_dict(state, strict=True)
    return built


def channels_first(x: np.ndarray) -> torch.Tensor:
    """[B, F, Y, X, Z] -> [B, Z, F, Y, X]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def golden(name: str, case: Case) -> dict[str, np.ndarray]:
    """Velocity, and samples of all gradients of sum(velocity * probe)."""
    inputs = case.inputs(name)
    video = channels_first(inputs["video"]).requires_grad_()
    prompts = torch.from_numpy(inputs["text"]).requires_grad_()
    rows = torch.arange(max(PROMPTS))[None, :, None]
    text = torch.where(rows < torch.tensor(PROMPTS)[:, None, None], prompts, 0)
    text = torch.nn.functional.pad(text, (0, 0, 0, TEXT_ROWS - max(PROMPTS)))
    given = torch.cat([video, channels_first(inputs["condition"])], dim=1)
    frames = torch.from_numpy(case.timesteps())
    of_tokens = frames.repeat_interleave(ROWS // 2 * COLUMNS // 2, dim=1)
    timestep = of_tokens if case.clean_first_frame else frames[:, 0]

    networks = {part: network(case, f"{name}/{part}") for part in case.networks}
    velocity = [
        networks[case.network_of(b)](given[b : b + 1], timestep[b : b + 1], text[b : b + 1], return_dict=False)[0]
        for b in range(BATCH)
    ]
    velocity = torch.cat(velocity)
    (velocity * channels_first(inputs["probe"])).sum().backward()
    gradients = {
        f"{part}/{key}": sampled(x.grad.numpy())
        for part, built in networks.items()
        for key, x in sorted(built.named_parameters())
    }
    gradients |= {"video": sampled(np.moveaxis(video.grad.numpy(), 1, -1)), "text": sampled(prompts.grad.numpy())}
    return {
        "velocity": np.moveaxis(velocity.detach().numpy(), 1, -1),
        "gradients": np.concatenate([gradients[key] for key in sorted(gradients)]),
    }


def listing(heads: int, depth: int, mlp_dim: int, channels_in: int, channels_out: int) -> str:
    """A digest of all names and shapes at full size."""
    with torch.device("meta"):
        built = WanTransformer3DModel(
            num_attention_heads=heads,
            in_channels=channels_in,
            out_channels=channels_out,
            ffn_dim=mlp_dim,
            num_layers=depth,
        )
    lines = sorted(f"{name} {tuple(x.shape)}" for name, x in built.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def pickles() -> None:
    """Files as torch saves them: named tensors of both types, parts of storages and parameters, and what is refused."""
    base = torch.from_numpy(numbers("pickled", 4, 6))
    tensors = {
        "whole": base,
        "part": base[1:3],
        "half": base.bfloat16(),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(0.5),
    }
    torch.save(collections.OrderedDict(tensors), GOLDEN / "tensors.pth")
    torch.save({"state_dict": {"columns": base.T}}, GOLDEN / "columns.pth")
    torch.save({"state_dict": {"half": base.half(), "counts": torch.arange(3)}}, GOLDEN / "other-types.pth")
    torch.save({"weights": tensors, "step": 3}, GOLDEN / "nested.pth")


def main() -> None:
    """All cases."""
    GOLDEN.mkdir(exist_ok=True)
    pickles()
    torch.manual_seed(0)
    for name, case in CASES.items():
        np.savez_compressed(GOLDEN / f"{name}.npz", **golden(name, case))
    listings = {name: np.array(listing(*sizes)) for name, sizes in FULL_SIZE.items()}
    np.savez_compressed(GOLDEN / "wan-names.npz", **listings)
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}:", *sorted(x.name for x in GOLDEN.iterdir()))
    print(f"latents of {FRAMES} x {ROWS} x {COLUMNS}, {BATCH} scenes, prompts of {PROMPTS} of {TEXT_ROWS} rows")


if __name__ == "__main__":
    main()
