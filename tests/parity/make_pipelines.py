"""Writes what diffusers' WanPipeline and WanImageToVideoPipeline make: `python -m tests.parity.make_pipelines`, in
make_wan.py's environment.

    python -m tests.parity.make_pipelines --transformer out/wan-tuned --out out/diffusers.npz

writes what WanPipeline makes of weights that its own class loads from a folder, in the small Wan 2.1.
"""

import argparse
import pathlib

import diffusers
import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from tests.parity.make_umt5 import NARROW, encoder
from tests.parity.make_umt5 import _one as umt5_name
from tests.parity.make_vae import autoencoder
from tests.parity.numbers import weight
from tests.parity.pipeline_cases import (
    CASES,
    DEPTH,
    FRAMES,
    GOLDEN,
    HEAD_DIM,
    HEADS,
    MLP_DIM,
    SHIFTS,
    STEPS,
    TEXT_DIM,
    TEXT_ROWS,
    Case,
    prompts,
    spread,
)
from tests.parity.vae_cases import CASES as VAES


def filled(built: torch.nn.Module, model: str, name_of=lambda key: key) -> torch.nn.Module:
    """The network with its weights."""
    state = {
        key: torch.from_numpy(weight(model, name_of(key), tuple(x.shape))) for key, x in built.state_dict().items()
    }
    built.load_state_dict(state, strict=True)
    return built.eval()


def transformer(case: Case, part: str) -> WanTransformer3DModel:
    """One of the networks."""
    built = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=case.channels + case.condition,
        out_channels=case.channels,
        text_dim=TEXT_DIM,
        ffn_dim=MLP_DIM,
        num_layers=DEPTH,
    )
    return filled(built.float(), part)


def embedded() -> list[torch.Tensor]:
    """Rows of the prompt and of the negative one, padded with zeros."""
    model, rows = filled(encoder(NARROW), "umt5", umt5_name), []
    for ids in prompts()[1]:
        out = model(input_ids=torch.tensor([ids])).last_hidden_state
        rows.append(torch.nn.functional.pad(out, (0, 0, 0, TEXT_ROWS - len(ids))))
    return rows


def scheduler(solver: str):
    """As the published pipelines have it."""
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=SHIFTS[solver])
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFTS[solver]}
    return UniPCMultistepScheduler(**flow)


def run(
    name: str,
    case: Case,
    solver: str,
    means: np.ndarray,
    deviations: np.ndarray,
    networks: list[WanTransformer3DModel],
) -> dict[str, np.ndarray]:
    """Some of the numbers of latents, and of pixels."""
    vae = filled(autoencoder(VAES[case.vae], VAES[case.vae].encoder, VAES[case.vae].decoder), f"vae/{case.vae}")
    vae.register_to_config(latents_mean=means.tolist(), latents_std=deviations.tolist())
    pipe = (WanImageToVideoPipeline if case.image else WanPipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler(solver),
        transformer=networks[0],
        transformer_2=networks[1] if case.boundary else None,
        boundary_ratio=case.boundary or None,
        expand_timesteps=case.vae == "2.2",
    )
    pipe.set_progress_bar_config(disable=True)
    text, negative = embedded()
    given = {
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
        "height": case.size[0],
        "width": case.size[1],
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": case.guidance,
        "guidance_scale_2": case.guidance_low if case.boundary else None,
        "latents": torch.from_numpy(np.ascontiguousarray(np.moveaxis(case.noise(name), -1, 0)[None])),
    }
    if case.image:
        given["image"] = Image.fromarray(case.picture(name))
    latents = pipe(**given, output_type="latent").frames
    pixels = pipe(**given, output_type="np").frames
    print(f"{name} {solver}: latents of {float(latents.std()):.3g}, pixels of {float(pixels.std()):.3g}")
    return {
        f"{solver}/latents": spread(np.moveaxis(latents.numpy()[0], 0, -1)),
        f"{solver}/pixels": spread(2 * pixels[0] - 1).astype(np.float32),
    }


def main() -> None:
    """All cases, or one with weights from a folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.make_pipelines")
    parser.add_argument("--transformer", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    published: dict[str, dict[str, np.ndarray]] = {}
    exec((GOLDEN.parents[2] / "moc_jax" / "codecs" / "wan_vae" / "published.py").read_text(), published)
    for name, case in CASES.items():
        of_latents = published["MEANS"][case.vae], published["DEVIATIONS"][case.vae]
        with torch.no_grad():
            if args.transformer:
                loaded = WanTransformer3DModel.from_pretrained(args.transformer, torch_dtype=torch.float32)
                np.savez_compressed(args.out, **run(name, case, "unipc", *of_latents, [loaded.eval()]))
                break
            networks = [transformer(case, part) for part in case.networks]
            found = [run(name, case, solver, *of_latents, networks) for solver in SHIFTS]
        np.savez_compressed(GOLDEN / f"pipeline-{name}.npz", **(found[0] | found[1]))
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
