"""Video files -> encoded scenes on disk (`prepare`) -> batches (`make_pipeline`)."""

from moc_jax.data.buckets import resolved
from moc_jax.data.captions import CaptionError
from moc_jax.data.manifest import DataError, Manifest, codec_of
from moc_jax.data.pipeline import make_pipeline
from moc_jax.data.prepare import check_sources, prepare
from moc_jax.data.prune import prune
from moc_jax.data.video import VideoError, read_video, write_video

__all__ = [
    "CaptionError",
    "DataError",
    "Manifest",
    "VideoError",
    "check_sources",
    "codec_of",
    "make_pipeline",
    "prepare",
    "prune",
    "read_video",
    "resolved",
    "write_video",
]
