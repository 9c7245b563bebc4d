"""The demo: one real clip, learned whole and sampled back from noise by its captions, on a laptop's processor.

Trains a 2.5 M parameter MoC DiT on the ten seconds and six shots of `bikes.mp4` (32 latent frames of 4 x 10 tokens):
each query reads its own shot, all captions and the 3 two-frame chunks of earlier shots that match it best.

    make demo

or, once the clip is there (`python -m moc_jax.data.demo_clip cache/demo`),

    moc-train --config demo
    moc-sample --checkpoint out/demo --storyboard configs/demo/storyboard.yaml --out out/demo/sample.mp4

One network on one scene: it shows that the whole path works, not that the model generalises.
"""

import dataclasses

from moc_jax.config import (
    ChunkConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    HashConfig,
    MoCConfig,
    OptimizerConfig,
    PcaConfig,
    SampleConfig,
    TrainConfig,
)
from moc_jax.config.presets import PRESETS

config = Config(
    workdir="out/demo",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=3),
    model=dataclasses.replace(PRESETS["demo"], latent_channels=32, text_dim=128),
    codec=PcaConfig(channels=32),
    text=HashConfig(dim=128),
    data=DataConfig(
        source=("cache/demo",),
        cache="cache/demo-latents",
        height=64,
        width=160,
        fps=12,
        caption_dropout=0.0,  # one scene: nothing to steer away from
        image_conditioning=0.0,
    ),
    diffusion=DiffusionConfig(t_mean=0.7),  # high noise is where scenes are distinguished
    sample=SampleConfig(steps=20, shift=1.0),
    optimizer=OptimizerConfig(learning_rate=8e-3, schedule="cosine", warmup_steps=50),
    train=TrainConfig(steps=900, ema_decay=0.99, checkpoint_every=300),
)
