"""Adapters (LoRA) of Wan as public files have them: which tensor belongs to which linear map.

transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers and PEFT; alpha stands in the file's metadata
diffusion_model.blocks.0.self_attn.q.lora_down.weight   ComfyUI, with the Wan team's names; .alpha beside it
lora_unet_blocks_0_self_attn_q.lora_down.weight         musubi-tuner, read alone
"""

import functools
import re
from typing import Literal

from moc_jax.config import ModelConfig, WanConfig
from moc_jax.config.lora import LoraConfig
from moc_jax.models.wan.names import Names, Tensor, adapter_tensors, linear_maps

Part = Literal["a", "b", "alpha"]
PREFIXES: dict[Names, str] = {
    "diffusers": "transformer.",
    "original": "diffusion_model.",
    "comfyui": "diffusion_model.",
}
_FLAT = "lora_unet_"
_PARTS: dict[str, Part] = {
    "lora_A.weight": "a",
    "lora_down.weight": "a",
    "lora_B.weight": "b",
    "lora_up.weight": "b",
    "lora_A.default.weight": "a",
    "lora_B.default.weight": "b",
    "alpha": "alpha",
}
_NAME = re.compile(
    rf"(transformer\.|diffusion_model\.|base_model\.model\.|{_FLAT}|)(.+)\.({'|'.join(map(re.escape, _PARTS))})"
)


def adapter_part(name: str) -> tuple[str, Part, Names] | None:
    """The linear map that a tensor is of, by diffusers' name, which part of its adapter, and whose names these are.

    None: it is none of an adapter of Wan.
    """
    if not (found := _NAME.fullmatch(name)):
        return None
    prefix, module, part = found.groups()
    layer = match[1] if (match := re.match(r"blocks[._](\d+)", module)) else ""
    known = _modules()[prefix == _FLAT].get(re.sub(r"^blocks([._])\d+", r"blocks\g<1>0", module))
    if known is None:
        return None
    diffusers, names = known
    return diffusers.replace("blocks.0.", f"blocks.{layer}.", 1), _PARTS[part], names


@functools.cache
def _modules() -> tuple[dict[str, tuple[str, Names]], dict[str, tuple[str, Names]]]:
    """Of linear maps, those of the first block for all: diffusers' name by any, and by any written with underscores."""
    dotted: dict[str, tuple[str, Names]] = {}
    flat: dict[str, tuple[str, Names]] = {}
    for (diffusers, original), _, _ in linear_maps(1):
        dotted |= {original: (diffusers, "original"), diffusers: (diffusers, "diffusers")}
        flat[original.replace(".", "_")] = diffusers, "original"
    return dotted, flat


def original_name(module: str) -> str:
    """The Wan team's name of a linear map, by diffusers'."""
    layer = found[1] if (found := re.match(r"blocks\.(\d+)\.", module)) else ""
    first = re.sub(r"^blocks\.\d+\.", "blocks.0.", module)
    (original,) = (names[1] for names, _, _ in linear_maps(1) if names[0] == first)
    return original.replace("blocks.0.", f"blocks.{layer}.", 1)


def written_names(module: str, names: Names) -> tuple[str, str, str]:
    """What files with these names call A, B and alpha of a linear map, of which diffusers' name is given."""
    if names == "diffusers":
        of = PREFIXES[names] + module
        return f"{of}.lora_A.weight", f"{of}.lora_B.weight", f"{of}.alpha"
    of = PREFIXES[names] + original_name(module)
    return f"{of}.lora_down.weight", f"{of}.lora_up.weight", f"{of}.alpha"


def public_adapters(cfg: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """A and B of every linear map that has an adapter, by network and by diffusers' name."""
    assert isinstance(cfg, WanConfig)
    parts = ("high", "low") if cfg.boundary else ("network",)
    return {
        part: {
            names[0]: adapter_tensors(cfg, names, ours, layer, lora.rank)
            for names, ours, layer in linear_maps(cfg.depth)
            if lora.names(f"{part}/{ours}")
        }
        for part in parts
    }
