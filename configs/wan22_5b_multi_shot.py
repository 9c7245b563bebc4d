"""Scenes of up to 8 shots of 4 seconds at 1280x704 with Wan 2.2 TI2V 5B, all weights trained: LCT's recipe.

    moc-train --config wan22_5b_multi_shot --data.source videos/ --workdir runs/wan_multi

The weights lie in `Wan2.2-TI2V-5B`, or where `--train.init-from`, `--codec.weights` and `--text.weights` say. What LCT
adds to a model of single shots (arXiv 2503.10589): a noise level for each shot, which TI2V 5B takes without a new
weight; a caption for each shot beside the scene's; positions per shot (`model.positions time`, 8 latent frames apart;
`diagonal` is LCT's own); shots that are one picture now and then (`data.image_conditioning`). What MoC adds: a query
reads its own shot and 5 chunks of earlier ones, which shrink from 13 to 2 latent frames while training, with drop-off
and drop-in; at the end 83 % of the pairs are skipped.

Predicted, not measured, for 16 scenes of 176 000 tokens a step (`moc-plan --config wan22_5b_multi_shot`):

    h200:16        87 GiB of 140, 27 s       --mesh.fsdp 16
    v5p:4x4x4      49 GiB of 96, 11 s        --mesh.fsdp 16 --mesh.context 4
    v6e:8x8        21 GiB of 31, 13 s        --mesh.fsdp 16 --mesh.context 4

166 PFLOP a step; a checkpoint takes 80 GB. The learning rate is a choice, not a finding. For adapters instead, add
`--model.lora.rank 64`.
"""

from moc_jax.config import (
    ChunkConfig,
    ChunkStage,
    Config,
    DataConfig,
    DiffusionConfig,
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
    workdir="runs/wan22_5b_multi_shot",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=5),
    model=PRESETS["wan22-5b"],
    codec=WanVaeConfig(version="2.2", weights=WEIGHTS),
    text=Umt5Config(weights=WEIGHTS),
    data=DataConfig(height=704, width=1280, fps=24, max_shot_frames=97, shots_per_scene=8),
    diffusion=DiffusionConfig(t_shift=5.0),
    sample=SampleConfig(steps=50, guidance=5.0, shift=5.0),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=500),
    train=TrainConfig(
        init_from=WEIGHTS,
        steps=20_000,
        batch_size=16,
        chunk_schedule=(
            ChunkStage(step=0, size=13),
            ChunkStage(step=5_000, size=7),
            ChunkStage(step=10_000, size=4),
            ChunkStage(step=15_000, size=2),
        ),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)
