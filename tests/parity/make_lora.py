"""Writes what diffusers computes with our adapters: `python -m tests.parity.make_lora`, where make_wan.py runs.

The environment needs peft, too. Files are read as a user's are: by WanPipeline, which knows ComfyUI's names as well.
"""

import diffusers
import numpy as np
import peft
import torch
from diffusers import WanPipeline

from tests.parity.lora_cases import FILES, GOLDEN, NAME
from tests.parity.make_wan import channels_first, network
from tests.parity.wan_cases import BATCH, CASES, PROMPTS, TEXT_ROWS


def velocity(file: str | None) -> np.ndarray:
    """Of both scenes."""
    case = CASES[NAME]
    inputs, model = case.inputs(NAME), network(case, f"{NAME}/network")
    if file is not None:
        state, metadata = WanPipeline.lora_state_dict(str(GOLDEN / file), return_lora_metadata=True)
        WanPipeline.load_lora_into_transformer(state, model, adapter_name="ours", metadata=metadata)
        assert len(model.peft_config["ours"].target_modules) > 0
    rows = torch.arange(max(PROMPTS))[None, :, None]
    text = torch.where(rows < torch.tensor(PROMPTS)[:, None, None], torch.from_numpy(inputs["text"]), 0)
    text = torch.nn.functional.pad(text, (0, 0, 0, TEXT_ROWS - max(PROMPTS)))
    video, t = channels_first(inputs["video"]), torch.from_numpy(case.timesteps()[:, 0])
    with torch.no_grad():
        each = [model(video[b : b + 1], t[b : b + 1], text[b : b + 1], return_dict=False)[0] for b in range(BATCH)]
    return np.moveaxis(torch.cat(each).numpy(), 1, -1)


def main() -> None:
    """With each file, and without."""
    found = {name: velocity(file) for name, file in FILES.items()} | {"none": velocity(None)}
    np.savez_compressed(GOLDEN / "lora.npz", **found)
    print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
