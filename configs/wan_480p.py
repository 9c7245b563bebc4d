"""Single shots in the shape of Wan 2.1 at 480p: 81 frames of 832x480 at 16 frames/s, 21 latent frames of 1 560 tokens.

One latent frame is one chunk; each query reads its own frame, all captions and 3 more frames: 81 % of the pairs are
skipped (`python -m moc_jax.attention.accounting`). The network is our MMDiT of a like size, with our own codec and
text encoder; Wan's weights do not load into it.

    moc-train --config wan_480p --data.source videos/ --workdir runs/wan
"""

import dataclasses

from moc_jax.config import ChunkConfig, Config, DataConfig, DiffusionConfig, MeshConfig, MoCConfig, TrainConfig
from moc_jax.config.presets import PRESETS

config = Config(
    workdir="runs/wan_480p",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=1), top_k=3, self_anchor="chunk", causal_routing=False),
    model=dataclasses.replace(PRESETS["large"], text_dim=256),
    data=DataConfig(height=480, width=832, fps=16, min_shot_frames=81, max_shot_frames=81, shots_per_scene=1),
    diffusion=DiffusionConfig(t_shift=2.0),
    train=TrainConfig(steps=10_000, batch_size=8),
    mesh=MeshConfig(data=1, fsdp=-1),
)
