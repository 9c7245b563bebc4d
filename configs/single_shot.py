"""Single shots, 8 seconds at 320x192 and 12 frames/s: the published single-shot setting, the first stage of training.

25 latent frames of 240 tokens; each query reads its own chunk of 256 tokens, all captions and 3 more chunks, chosen
from the whole shot: 84 % of the pairs are skipped (`python -m moc_jax.attention.accounting`).

    moc-train --config single_shot --data.source videos/ --workdir runs/single

The published schedule: 10 000 iterations at a learning rate of 9e-5, before multi-shot training.
"""

from moc_jax.config import ChunkConfig, Config, DataConfig, MoCConfig, TrainConfig
from moc_jax.config.presets import PRESETS

config = Config(
    workdir="runs/single_shot",
    moc=MoCConfig(chunk=ChunkConfig(size=256), top_k=3, self_anchor="chunk", causal_routing=False),
    model=PRESETS["small"],
    data=DataConfig(height=192, width=320, fps=12, max_shot_frames=97, min_shot_frames=97, shots_per_scene=1),
    train=TrainConfig(steps=10_000, batch_size=32, checkpoint_every=500),
)
