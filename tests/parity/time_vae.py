"""The other side of benchmarks/wan_vae.py, which runs it where torch and diffusers are: the same sizes, the same card.

Inputs and results stay on the card, which is in diffusers' favour.
"""

import json
import statistics
import sys
import time

import diffusers
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
    with torch.no_grad():
        latents, encode = _measured(lambda: built.encode(video).latent_dist.mode(), device, given["repeats"])
        _, decode = _measured(lambda: built.decode(latents).sample, device, given["repeats"])
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    print(json.dumps({"versions": versions, "device": name, "encode": encode, "decode": decode}))


def _measured(call, device: str, repeats: int) -> tuple[torch.Tensor, dict]:
    """The last result, and seconds and bytes."""
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        out = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    rest = statistics.median(seconds[1:])
    return out, {"seconds": rest, "first_seconds": seconds[0], "peak_bytes": memory}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
