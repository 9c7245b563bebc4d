"""Video files -> encoded scenes on disk (`prepare`) -> batches (`make_pipeline`)."""

from moc_jax.data.buckets import Buckets, assign_buckets, resolved
from moc_jax.data.captions import CaptionError, Captions, load_captions
from moc_jax.data.manifest import DataError, Manifest, SceneEntry, codec_of, load_manifest, verify
from moc_jax.data.pack import blank_scene, misfit, pack_scene, stack_scenes
from moc_jax.data.pipeline import SceneIterator, make_pipeline
from moc_jax.data.prepare import prepare
from moc_jax.data.shards import ShardReader
from moc_jax.data.video import VideoError, read_video, write_video

__all__ = [
    "Buckets",
    "CaptionError",
    "Captions",
    "DataError",
    "Manifest",
    "SceneEntry",
    "SceneIterator",
    "ShardReader",
    "VideoError",
    "assign_buckets",
    "blank_scene",
    "codec_of",
    "load_captions",
    "load_manifest",
    "make_pipeline",
    "misfit",
    "pack_scene",
    "prepare",
    "read_video",
    "resolved",
    "stack_scenes",
    "verify",
    "write_video",
]
