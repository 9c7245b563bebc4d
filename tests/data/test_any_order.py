"""However data came to be what it is, batches are those of one clean preparation of it with the same codec."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moc_jax.data import codec_of, make_pipeline, prepare
from moc_jax.data import work as work_module
from tests.data.clips import make_clip
from tests.data.small import SIZE, small_config, with_data

NAMES = "a", "b", "c", "d"
LENGTHS = (9,), (13, 9), (41,), (5, 5, 21), (3,)  # of the videos that there are; of the last nothing is used

change = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES), st.integers(0, len(LENGTHS) - 1)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("caption"), st.sampled_from(NAMES), st.sampled_from(["one", "two", ""])),
    st.tuples(st.just("kill"), st.integers(0, 3), st.sampled_from(["before it is complete", "before it is described"])),
    st.tuples(st.just("prepare")),
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for number, lengths in enumerate(LENGTHS):
        path, shots = folder / f"{number}.mp4", len(lengths)
        make_clip(path, shots=shots, frames_per_shot=lengths, size=SIZE, seed=number)
    return folder


def _apply(action, videos, pool):
    kind, name, *rest = action
    file = videos / f"{name}.mp4"
    if kind == "add":
        shutil.copy(pool / f"{rest[0]}.mp4", file)
    elif kind == "remove":
        file.unlink(missing_ok=True)
    elif kind == "rename" and file.exists():
        file.rename(videos / f"{rest[0]}.mp4")
    elif kind == "caption":
        (videos / f"{name}.txt").write_text(rest[0])


class _Killed(BaseException):
    """No `except Exception` catches it, as nothing catches a kill; what was half-written stays, too."""


@contextlib.contextmanager
def _killed(after, when):
    """The preparation ends at a video, before its shard has its name or before what is in it is said."""
    with pytest.MonkeyPatch.context() as patch:
        name = "whole_file" if when == "before it is complete" else "save_record"
        count, work = iter(range(99)), getattr(work_module, name)

        def ends(*arguments):
            if next(count) >= after:
                raise _Killed
            return work(*arguments)

        patch.setattr(work_module, name, ends)
        yield


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(actions=st.lists(change, min_size=3, max_size=9))
def test_batches_are_those_of_a_clean_preparation(pool, actions):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "videos").mkdir()
        shutil.copy(pool / "1.mp4", folder / "videos" / "always.mp4")
        cfg = small_config(folder, max_shot_frames=17, keyframes=2, caption_dropout=0.3, image_conditioning=0.3)
        codec = codec_of(prepare(cfg))
        for action in actions:
            if action[0] == "kill":
                with _killed(*action[1:]), contextlib.suppress(_Killed):
                    prepare(cfg)
            elif action[0] == "prepare":
                prepare(cfg)
            else:
                _apply(action, folder / "videos", pool)
        ours = prepare(cfg)
        clean = prepare(with_data(cfg, cache=str(folder / "clean")), codec)
        assert (ours.fingerprint, ours.skipped, ours.counts) == (clean.fingerprint, clean.skipped, clean.counts)
        both = [make_pipeline(cfg, manifest, split="train") for manifest in (ours, clean)]
        for _ in range(6):
            jax.tree.map(np.testing.assert_array_equal, *map(next, both))
        for each in both:
            each.close()
