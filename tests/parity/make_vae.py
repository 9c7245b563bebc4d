"""Writes what diffusers' AutoencoderKLWan computes: `python -m tests.parity.make_vae`, in make_wan.py's environment."""

import hashlib
import pathlib

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from tests.parity.numbers import weight
from tests.parity.vae_cases import CASES, Case, spread

GOLDEN = pathlib.Path(__file__).parent / "golden"
PUBLISHED = pathlib.Path(__file__).parents[2] / "moc_jax" / "codecs" / "wan_vae" / "published.py"
FULL_SIZE = {"2.1": (96, 96), "2.2": (160, 256)}


def autoencoder(case: Case, encoder: int, decoder: int) -> AutoencoderKLWan:
    """One with these widths."""
    wide = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return AutoencoderKLWan(
        base_dim=encoder,
        decoder_base_dim=decoder,
        z_dim=case.channels,
        latents_mean=[0.0] * case.channels,
        latents_std=[1.0] * case.channels,
        **(wide if case.shortcuts else {}),
    ).eval()


def golden(name: str, case: Case, mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the numbers of normalised latents, and of pixels."""
    built = autoencoder(case, case.encoder, case.decoder)
    state = {key: torch.from_numpy(weight(f"vae/{name}", key, tuple(x.shape))) for key, x in built.state_dict().items()}
    built.load_state_dict(state, strict=True)
    with torch.no_grad():
        video = torch.from_numpy(np.ascontiguousarray(np.moveaxis(case.video(name), -1, 1)))
        latents = np.moveaxis(built.encode(video).latent_dist.mode().numpy(), 1, -1)
        given = np.moveaxis(case.latents(name) * std + mean, -1, 1)
        pixels = np.moveaxis(built.decode(torch.from_numpy(np.ascontiguousarray(given))).sample.numpy(), 1, -1)
    with torch.device("meta"):
        state = autoencoder(case, *FULL_SIZE[name]).state_dict()
    lines = sorted(f"{key} {tuple(x.shape)}" for key, x in state.items())
    listing = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    latents = (latents - mean) / std
    return {"latents": spread(latents), "pixels": spread(pixels), "listing": np.array(listing)}


def main() -> None:
    """Both."""
    published: dict[str, dict[str, np.ndarray]] = {}
    exec(PUBLISHED.read_text(), published)  # the package itself needs jax
    means, deviations = published["MEANS"], published["DEVIATIONS"]
    built_in = AutoencoderKLWan(base_dim=4).config
    np.testing.assert_array_equal(means["2.1"], np.float32(built_in.latents_mean))
    np.testing.assert_array_equal(deviations["2.1"], np.float32(built_in.latents_std))
    for name, case in CASES.items():
        np.savez_compressed(GOLDEN / f"vae{name}.npz", **golden(name, case, means[name], deviations[name]))
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
