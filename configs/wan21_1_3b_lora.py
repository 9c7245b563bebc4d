"""Adapters for Wan 2.1 T2V 1.3B: 81 frames of 832x480, from dense attention to Mixture of Contexts.

    moc-train --config wan21_1_3b_lora --data.source videos/ --workdir runs/wan_lora

The weights lie in `Wan2.1-T2V-1.3B`, or where `--train.init-from`, `--codec.weights` and `--text.weights` say. Trained
are 43.7 M numbers beside 1.42 billion that stay as they are. Chunks of 7 latent frames with both others picked are
dense attention but for what drop-off drops; from step 1 000 on a query reads its own latent frame and 5 others, and
71 % of the pairs are skipped. Drop-off and drop-in are on throughout.

Predicted, not measured, for 8 scenes of 32 760 tokens a step (`moc-plan --config wan21_1_3b_lora`):

    h200:1         114 GiB of 140, 7.7 s     attention's outputs are kept, the rest is computed again
    v5p:2x2x1      34 GiB of 96, 3.4 s       --mesh.fsdp 4: two scenes each
    v6e:2x4        17 GiB of 31, 1.9 s       --mesh.fsdp 8: one scene each

2.67 PFLOP a step; a checkpoint takes 0.7 GB, since the weights are not in it.
"""

import dataclasses

from moc_jax.config import (
    ChunkConfig,
    ChunkStage,
    Config,
    DataConfig,
    DiffusionConfig,
    LoraConfig,
    MeshConfig,
    MoCConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    Umt5Config,
    WanVaeConfig,
)
from moc_jax.config.presets import PRESETS

WEIGHTS = "Wan2.1-T2V-1.3B"

config = Config(
    workdir="runs/wan21_1_3b_lora",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=5, self_anchor="chunk", causal_routing=False),
    model=dataclasses.replace(PRESETS["wan21-1.3b"], lora=LoraConfig(rank=32, alpha=32)),
    codec=WanVaeConfig(version="2.1", weights=WEIGHTS),
    text=Umt5Config(weights=WEIGHTS),
    data=DataConfig(height=480, width=832, fps=16, min_shot_frames=81, max_shot_frames=81, shots_per_scene=1),
    diffusion=DiffusionConfig(t_shift=3.0),
    sample=SampleConfig(steps=50, guidance=5.0, shift=5.0),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    train=TrainConfig(
        init_from=WEIGHTS,
        steps=2_000,
        batch_size=8,
        chunk_schedule=(
            ChunkStage(step=0, size=7, top_k=2),  # all that there is: dense
            ChunkStage(step=250, size=3, top_k=4),
            ChunkStage(step=500, size=1, top_k=8),
            ChunkStage(step=1_000, size=1, top_k=5),
        ),
        checkpoint_every=250,
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)
