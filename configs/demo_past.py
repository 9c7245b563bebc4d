"""The demo's clip, to be sampled shot by shot: each shot is learned after others, and sees no later one.

As configs/demo.py, one real clip of ten seconds and six shots, but in 24 orders, so that any shot may follow any
others and a film may be as long as one likes. Under `past` visibility and with teacher forcing every shot reads the
shots before it at a noise level of their own, as in sampling; a step has twice the tokens. What finished shots are read
by is then kept while the next one is sampled.

    python -m moc_jax.data.demo_clip cache/demo
    python -m moc_jax.data.demo_orders cache/demo/bikes.mp4 cache/demo-orders
    moc-train --config demo_past
    moc-sample --checkpoint out/demo_past --storyboard configs/demo/storyboard.yaml --extend out/film --retrieve-shots 3
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
    workdir="out/demo_past",
    moc=MoCConfig(chunk=ChunkConfig(unit="frames", size=2), top_k=3, visibility="past"),
    model=dataclasses.replace(PRESETS["demo"], latent_channels=32, text_dim=128),
    codec=PcaConfig(channels=32),
    text=HashConfig(dim=128),
    data=DataConfig(
        source=("cache/demo-orders",),
        cache="cache/demo-orders-latents",
        height=64,
        width=160,
        fps=12,
        caption_dropout=0.0,  # six shots: nothing to steer away from
        image_conditioning=0.0,
    ),
    diffusion=DiffusionConfig(t_mean=0.7, teacher_forcing=True),  # high noise is where scenes are distinguished
    sample=SampleConfig(steps=20, shift=1.0, order="shots"),
    optimizer=OptimizerConfig(learning_rate=8e-3, schedule="cosine", warmup_steps=50),
    train=TrainConfig(steps=900, ema_decay=0.99, checkpoint_every=300),
)
