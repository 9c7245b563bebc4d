"""Which settings of a run need less device memory."""

from typing import Protocol

from moc_jax.config import Config, DataConfig


class Configured(Protocol):
    """A run."""

    @property
    def config(self) -> Config:
        """What it was started with."""
        ...


def remedies(run: Configured) -> str:
    """What to change, what it is now, and what that costs."""
    cfg = run.config
    found = []
    if cfg.train.batch_size > 1:
        found.append(
            f"a smaller train.batch_size (now {cfg.train.batch_size}), with optimizer.accumulate (now "
            f"{cfg.optimizer.accumulate}) raised as much for the same updates"
        )
    if cfg.model.remat != "full":
        found.append(f"model.remat full (now {cfg.model.remat}; a forward pass more)")
    if cfg.model.dtype != "bfloat16":
        found.append(f"model.dtype bfloat16 (now {cfg.model.dtype})")
    found.append(f"a larger mesh.fsdp (now {cfg.mesh.fsdp}; splits weights and optimizer over more devices)")
    found.append(f"a larger mesh.context (now {cfg.mesh.context}; splits each scene over more devices)")
    found.append(
        f"smaller scenes: data.buckets (now {_largest(cfg.data)}), data.height x width (now {cfg.data.height}x"
        f"{cfg.data.width}), data.shots_per_scene (now {cfg.data.shots_per_scene}), data.max_shot_frames (now "
        f"{cfg.data.max_shot_frames})"
    )
    found.append(f"a smaller model (dim {cfg.model.dim}, depth {cfg.model.depth})")
    return (
        f"What would need less memory: {'; '.join(found)}. Checkpoints are intact: the same command with these resumes"
    )


def preview_remedies(run: Configured) -> str:
    """The same for a preview, whose sample has a size of its own."""
    cfg = run.config
    board = cfg.train.preview_storyboard or "the first training scene"
    return (
        f"What would need less memory: a shorter train.preview_storyboard (now {board}), sample.guidance 1 (now "
        f"{cfg.sample.guidance:g}), or train.preview_every 0 (now {cfg.train.preview_every}). Checkpoints are intact: "
        "the same command with these resumes"
    )


def _largest(data: DataConfig) -> str:
    frames = max((bucket.frames for bucket in data.buckets), default=0)
    return f"up to {frames} latent frames" if frames else "as long as the longest scene"
