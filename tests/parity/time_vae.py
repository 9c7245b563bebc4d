"""The other side of benchmarks/wan_vae.py, which runs it where torch and diffusers are: the same sizes, the same card.

Inputs and results stay on the card, which is in diffusers' favour.
"""

import json
import statistics
import sys
import time

import torch
from diffusers import AutoencoderKLWan

WIDE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def main(given: dict) -> None:
    """Encodes and decodes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = AutoencoderKLWan(**(WIDE if given["version"] == "2.2" else {}))
    built = built.to(device, getattr(torch, given["dtype"])).eval()
    video = torch.rand(1, 3, given["frames"], *given["size"], device=device, dtype=built.dtype) * 2 - 1
    name = torch.cuda.get_device_name() if device == "cuda" else "a processor"
    print(f"diffusers' AutoencoderKLWan, torch {torch.__version__}, {name}")
    with torch.no_grad():
        latents = _measured("encode", lambda: built.encode(video).latent_dist.mode(), device, given["repeats"])
        _measured("decode", lambda: built.decode(latents).sample, device, given["repeats"])


def _measured(what: str, call, device: str, repeats: int) -> torch.Tensor:
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        out = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    rest = statistics.median(seconds[1:])
    print(f"  {what}: {rest:.3f} s (the first call {seconds[0]:.1f} s), {memory / 1e9:.2f} GB at most", flush=True)
    return out


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
