"""How far WanDiT is from diffusers' WanTransformer3DModel: `python -m tests.parity.wan_figures` prints the table.

make_wan.py wrote what is compared with; here no torch is needed.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moc_jax.config import MoCConfig, WanConfig
from moc_jax.models.wan import WanDiT
from moc_jax.models.wan.names import tensors
from moc_jax.scene import SceneLengths
from tests.parity.numbers import relative, sampled, weight
from tests.parity.wan_cases import CASES, FRAMES, PROMPTS

GOLDEN = pathlib.Path(__file__).parent / "golden"


def config(case):
    return WanConfig(
        dim=case.heads * case.head_dim,
        depth=case.depth,
        heads=case.heads,
        mlp_dim=case.mlp_dim,
        latent_channels=case.channels,
        condition_channels=case.condition,
        text_dim=case.text_dim,
        boundary=case.boundary,
        dtype="float32",
        remat="none",
    )


def weights_of(name, case, cfg):
    """The model's graph, and the case's weights in it, filled tensor by tensor."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WanDiT(cfg, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), nnx.to_pure_dict(state))
    for part in case.networks:
        for tensor in tensors(cfg):
            leaf = functools.reduce(lambda tree, key: tree[key], tensor.path, params[part])
            leaf[... if tensor.layer is None else tensor.layer] = tensor.of_file(
                weight(f"{name}/{part}", tensor.name("diffusers"), tensor.shape)
            )
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params))
    return graph, params


def scenes(case, text, captions):
    """Prompts as captions, and the shots: with a clean first frame, a shot of it which the others continue.

    Args:
        captions: `own` alone, or `both`: the same as the scene's caption too.
    """
    shots = [1, FRAMES - 1] if case.clean_first_frame else [FRAMES]
    levels = [[0.0] * (len(shots) - 1) + [level] for level in case.levels]
    rows, lengths = [], []
    for prompt, size in zip(text, PROMPTS, strict=True):
        own = [size] * len(shots)
        lengths.append([size if captions == "both" else 0, *own])
        rows.append(jnp.concatenate([prompt[:size]] * (sum(x > 0 for x in lengths[-1]))))
    most = max(map(len, rows))
    packed = jnp.stack([jnp.pad(x, ((0, most - len(x)), (0, 0)), constant_values=3.0) for x in rows])
    of_shots = SceneLengths(
        jnp.array([shots] * len(text)), jnp.array(lengths), jnp.array([[i > 0 for i in range(len(shots))]] * len(text))
    )
    return packed, of_shots, jnp.array(levels)


def run(name, captions="own"):
    case = CASES[name]
    # What is kept for the backward pass must not matter.
    cfg = dataclasses.replace(config(case), remat="attention" if captions == "both" else "none")
    inputs = case.inputs(name)
    graph, params = weights_of(name, case, cfg)

    def loss(params, video, prompts):
        text, lengths, t = scenes(case, prompts, captions)
        condition = jnp.asarray(inputs["condition"]) if case.condition else None
        model = nnx.merge(graph, params)
        velocity = model(video, text, t, lengths, MoCConfig(mode="dense"), condition=condition)
        return jnp.sum(velocity * inputs["probe"]), velocity

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, velocity), (weights, video, text) = gradient(params, inputs["video"], inputs["text"])
    found = {"video": video, "text": text}
    for part in case.networks:
        for tensor in tensors(cfg):
            leaf = functools.reduce(lambda tree, key: tree[key], tensor.path, weights[part])
            mine = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
            found[f"{part}/{tensor.name('diffusers')}"] = tensor.to_file(mine)
    return np.asarray(velocity), {key: sampled(found[key]) for key in sorted(found)}


def errors(name, captions="own"):
    """Relative: of the velocity, and of the gradient of every tensor and input."""
    golden = np.load(GOLDEN / f"{name}.npz")
    velocity, gradients = run(name, captions)
    wanted = np.split(golden["gradients"], np.cumsum([len(x) for x in gradients.values()]))
    assert len(wanted.pop()) == 0
    return relative(velocity, golden["velocity"]), {
        key: relative(mine, of) for (key, mine), of in zip(gradients.items(), wanted, strict=True)
    }


def main():
    """All cases."""
    for name, captions in [*((name, "own") for name in CASES), ("wan2.1-t2v", "both")]:
        forward, gradients = errors(name, captions)
        worst = max(gradients, key=gradients.__getitem__)
        of_gradients = f"{gradients[worst]:.1e} | {worst} | {len(gradients)}"
        print(f"| {name} | {captions} | {forward:.1e} | {of_gradients} |", flush=True)


if __name__ == "__main__":
    main()
