"""What a step has to do: the scene that a config is for, before there is data, and its FLOPs."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from moc_jax.attention.accounting import Accounting, Exchange, account, chosen_exchange
from moc_jax.attention.deal import Deal, head_groups
from moc_jax.codecs import crop_frames, latent_frames
from moc_jax.config import BucketConfig, Config, ConfigError, ExchangeKind, MoCConfig
from moc_jax.models import matrix_flops, scene_shape
from moc_jax.scene import ChunkTable, SceneLengths, SceneShape, chunk_table

_CAPTION = 56  # tokens of a caption, where no bucket says how many there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The largest scene of a config, full to the brim: equal shots, no padding."""

    bucket: BucketConfig
    shape: SceneShape
    table: ChunkTable
    moc: MoCConfig
    """Of the schedule's last stage, which most steps are in, and whose chunks are the most."""
    cost: Accounting
    """Of one head in one layer."""
    matrices: float
    """FLOPs of a forward pass outside attention."""
    attention: float
    """FLOPs of a forward pass in attention: all heads and layers."""

    @property
    def tokens(self) -> int:
        """Of one scene, text and video."""
        return self.shape.tokens


def deal_over(cfg: Config, work: Workload, sizes: Mapping[str, int]) -> Deal:
    """How a scene lies on the devices that share it.

    Raises:
        ConfigError: heads don't divide by `attention.head_groups`.
    """
    groups = head_groups(cfg.model.heads // sizes["tensor"], sizes["context"], cfg.attention.head_groups)
    return Deal.of(work.shape, groups=sizes["context"] // groups, head_groups=groups, sharing=sizes["tensor"])


def moved_over(
    cfg: Config, work: Workload, sizes: Mapping[str, int], kind: ExchangeKind, scenes: int, element_bytes: int
) -> Exchange:
    """What attention moves between the devices of a scene; ConfigError as `deal_over`."""
    return chosen_exchange(
        deal_over(cfg, work, sizes),
        work.table,
        work.moc,
        kind,
        cfg.model.heads // sizes["tensor"],
        cfg.model.head_dim,
        scenes=scenes,
        element_bytes=element_bytes,
    )


def workload(cfg: Config) -> Workload:
    """What the largest of `data.buckets` holds; without any, shots of `data.max_shot_frames`, `data.shots_per_scene` of
    them.

    Raises:
        ConfigError: neither of them says how long a scene is.
    """
    bucket = max(cfg.data.buckets, key=lambda bucket: bucket.frames, default=None) or _bucket(cfg)
    moc = cfg.moc_at(cfg.train.steps - 1)
    shape, table = _scene(cfg, bucket, moc)
    cost = account(table, moc, cfg.model.head_dim)
    return Workload(
        bucket=bucket,
        shape=shape,
        table=table,
        moc=moc,
        cost=cost,
        matrices=matrix_flops(cfg.model, shape.text_tokens, shape.video_tokens),
        attention=cfg.model.depth * cfg.model.heads * cost.flops,
    )


def _bucket(cfg: Config) -> BucketConfig:
    if not cfg.data.max_shot_frames:
        raise ConfigError(
            "nothing says how long a scene is: give --data.buckets shots:frames:text_tokens, or --data.max-shot-frames"
        )
    shots, stride, patch = cfg.data.shots_per_scene, cfg.codec.stride[0], cfg.model.patch[0]
    cropped = crop_frames(cfg.data.max_shot_frames, stride, patch)  # as training does it
    if not cropped:
        raise ConfigError(
            f"data.max_shot_frames {cfg.data.max_shot_frames} is too short for the codec and the model's patches: they "
            f"take at least {stride * (patch - 1) + 1} frames"
        )
    frames = latent_frames(cropped, stride)
    return BucketConfig(
        shots=shots, frames=shots * frames, text_tokens=(shots + 1) * min(_CAPTION, cfg.text.max_tokens)
    )


def _scene(cfg: Config, bucket: BucketConfig, moc: MoCConfig) -> tuple[SceneShape, ChunkTable]:
    lengths = SceneLengths(_parts(bucket.frames, bucket.shots), _parts(bucket.text_tokens, bucket.shots + 1))
    video = 1, bucket.frames, *cfg.latent_size, cfg.codec.channels
    shape, lengths = scene_shape(cfg.model, video, (1, bucket.text_tokens, cfg.text.dim), lengths)
    return shape, jax.jit(functools.partial(chunk_table, shape=shape, chunk=moc.chunk))(lengths)


def _parts(whole: int, count: int) -> jax.Array:
    edges = np.linspace(0, whole, count + 1).astype(np.int32)
    return jax.numpy.asarray(np.diff(edges)[None])
