"""Scenes of up to 8 shots of 8 seconds at 480x480 and 12 frames/s: the published multi-shot setting, 180 000 tokens.

Each query reads its own shot, all captions and 5 chunks of earlier shots. Chunks shrink while training, from 10 240 to
1 280 tokens; at the end 84.5 % of the pairs are skipped (`python -m moc_jax.attention.accounting`).

    moc-train --config multi_shot --data.source videos/ --workdir runs/multi

The published schedule: 20 000 iterations at a learning rate of 9e-5, after single-shot training.
"""

from moc_jax.config import ChunkConfig, ChunkStage, Config, DataConfig, MeshConfig, MoCConfig, TrainConfig
from moc_jax.config.presets import PRESETS

config = Config(
    workdir="runs/multi_shot",
    moc=MoCConfig(chunk=ChunkConfig(size=1280), top_k=5),
    model=PRESETS["small"],
    data=DataConfig(height=480, width=480, fps=12, max_shot_frames=97, shots_per_scene=8),
    train=TrainConfig(
        steps=20_000,
        batch_size=8,
        chunk_schedule=(
            ChunkStage(step=0, size=10_240),
            ChunkStage(step=5_000, size=5_120),
            ChunkStage(step=10_000, size=2_560),
            ChunkStage(step=15_000, size=1_280),
        ),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
)
