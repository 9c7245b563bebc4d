"""A start for videos of your own: scenes of up to 8 shots of any length up to 8 seconds, 160x96 at 12 frames/s.

Each query reads its own shot, all captions and the 4 two-frame chunks of earlier shots that match it best. The model
has 115 M parameters and wants one accelerator; on a processor, add `--model.dim 128 --model.depth 4 --model.heads 2`.

    moc-train --config own_videos --data.source my_videos/ --workdir runs/mine

Shots longer than 8 seconds become parts that continue one another (`--data.max-shot-frames`). Look at
`runs/mine/previews` early: blur that does not sharpen wants more steps, noise wants a lower learning rate.
"""

from moc_jax.config import ChunkConfig, Config, DataConfig, MoCConfig, OptimizerConfig, PcaConfig, TrainConfig
from moc_jax.config.presets import PRESETS

config = Config(
    workdir="runs/own_videos",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=4),
    model=PRESETS["small"],
    codec=PcaConfig(channels=16),
    data=DataConfig(height=96, width=160, fps=12, min_shot_frames=5, max_shot_frames=97, shots_per_scene=8),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=500),
    train=TrainConfig(steps=20_000, batch_size=4, checkpoint_every=1_000, keep_every=5_000, preview_every=1_000),
)
