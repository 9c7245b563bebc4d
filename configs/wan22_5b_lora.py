"""Adapters for Wan 2.2 TI2V 5B: 121 frames of 1280x704, from dense attention to Mixture of Contexts.

    moc-train --config wan22_5b_lora --data.source videos/ --workdir runs/wan_lora

The weights lie in `Wan2.2-TI2V-5B`, or where `--train.init-from`, `--codec.weights` and `--text.weights` say. Trained
are 80.6 M numbers beside 5 billion that stay as they are. Chunks of 8 latent frames with the 3 others picked are dense
attention but for what drop-off drops; from step 1 000 on a query reads its own two latent frames and 3 more pairs of
them, and 74 % of the pairs are skipped. Drop-off and drop-in are on throughout.

Predicted, not measured, for 8 scenes of 27 280 tokens a step (`moc-plan --config wan22_5b_lora`):

    h200:1         111 GiB of 140, 15.7 s    all is computed again
    h200:8         79 GiB of 140, 1.6 s      --mesh.fsdp 8: one scene each
    v5p:2x2x2      80 GiB of 96, 2.8 s       --mesh.fsdp 8: one scene each
    v6e:2x4        27 GiB of 31, 3.2 s       --mesh.fsdp 8: one scene each

5.48 PFLOP a step; a checkpoint takes 1.3 GB, since the weights are not in it.
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

WEIGHTS = "Wan2.2-TI2V-5B"

config = Config(
    workdir="runs/wan22_5b_lora",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=3, self_anchor="chunk", causal_routing=False),
    model=dataclasses.replace(PRESETS["wan22-5b"], lora=LoraConfig(rank=32, alpha=32)),
    codec=WanVaeConfig(version="2.2", weights=WEIGHTS),
    text=Umt5Config(weights=WEIGHTS),
    data=DataConfig(height=704, width=1280, fps=24, min_shot_frames=121, max_shot_frames=121, shots_per_scene=1),
    diffusion=DiffusionConfig(t_shift=5.0),
    sample=SampleConfig(steps=50, guidance=5.0, shift=5.0),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    train=TrainConfig(
        init_from=WEIGHTS,
        steps=2_000,
        batch_size=8,
        chunk_schedule=(
            ChunkStage(step=0, size=8, top_k=3),  # all that there is: dense
            ChunkStage(step=250, size=4, top_k=4),
            ChunkStage(step=500, size=2, top_k=6),
            ChunkStage(step=1_000, size=2, top_k=3),
        ),
        checkpoint_every=250,
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)
