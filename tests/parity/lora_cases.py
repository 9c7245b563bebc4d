"""What the parity of adapters is proven on: those of all linear maps of two blocks, in a file of each spelling."""

import pathlib

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAME = "wan2.1-t2v"  # of wan_cases
RANK, ALPHA = 2, 5.0
FILES = {"diffusers": "lora-diffusers.safetensors", "comfyui": "lora-comfyui.safetensors"}
