"""Nothing is encoded twice: what the cache is asked for again is found by content, and what is lost is made again."""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil

import numpy as np
import PIL.Image
import pytest

from moc_jax.codecs import CODECS, sums_of
from moc_jax.config import PcaConfig
from moc_jax.data import cache as cache_module
from moc_jax.data import encode
from moc_jax.data import work as work_module
from moc_jax.data.cache import Cache
from moc_jax.data.manifest import DataError, codec_of, damaged_shards, verify
from moc_jax.data.prepare import prepare
from moc_jax.data.sources import find_sources
from moc_jax.data.video import VideoError
from moc_jax.data.work import Work
from tests.config.kinds import WEIGHTS, MeanCodec, MeanConfig
from tests.data.clips import make_clip
from tests.data.small import SIZE, assert_same, encoded, latents, make_videos, small_config, with_data

__all__ = ["encoded"]


@pytest.fixture
def decoded(monkeypatch):
    """The file names of the videos that are decoded."""
    names, decode = [], encode.decode

    def watched(path, *arguments):
        names.append(path.name)
        return decode(path, *arguments)

    monkeypatch.setattr(encode, "decode", watched)
    return names


class TestOnlyWhatIsNew:
    @pytest.fixture
    def cfg(self, tmp_path):
        make_videos(tmp_path, a=(13,), b=(13, 13))
        cfg = small_config(tmp_path, max_shot_frames=17)
        prepare(cfg)
        return cfg

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("another file", ["c.mp4"]),
            ("a file less", []),
            ("renamed", []),
            ("captions", []),
            ("default captions", []),
            ("held out", []),
            ("scenes of fewer shots", []),
            ("another model", []),
            ("the same cuts, given", ["b.mp4"]),
            ("longer parts", ["a.mp4", "b.mp4"]),
            ("other bytes", ["a.mp4"]),
        ],
    )
    def test_is_encoded(self, cfg, tmp_path, encoded, change, expected):
        videos = tmp_path / "videos"
        if change == "another file":
            make_clip(videos / "c.mp4", shots=1, frames_per_shot=13, size=SIZE, seed=2)
        elif change == "a file less":
            (videos / "a.mp4").unlink()
        elif change == "renamed":
            (videos / "a.mp4").rename(videos / "z.mp4")
        elif change == "captions":
            (videos / "b.yaml").write_text("caption: new\nshots: [one, two]")
        elif change == "default captions":
            cfg = with_data(cfg, default_caption="new")
        elif change == "held out":
            cfg = with_data(cfg, source=(str(videos / "b.mp4"),), validation_source=(str(videos / "a.mp4"),))
        elif change == "scenes of fewer shots":
            cfg = with_data(cfg, shots_per_scene=1)
        elif change == "another model":
            cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dim=48, depth=2))
        elif change == "the same cuts, given":
            (videos / "b.yaml").write_text("cuts: [1.083]")
        elif change == "longer parts":
            cfg = with_data(cfg, max_shot_frames=0)
        else:
            make_clip(videos / "a.mp4", shots=1, frames_per_shot=13, size=SIZE, seed=9)
        manifest = prepare(cfg)
        assert sorted(encoded) == expected
        verify(manifest, range(len(manifest.shards)))
        known = [note for note in manifest.notes if note.startswith("encoded with codecs/")]
        assert all("fitted before; --data.refit-codec True fits another" in note for note in known)
        assert len(known) == (change != "another model")  # which is the same data
        assert latents(manifest).keys() == {scene.name for scene in manifest.scenes}

    def test_one_content_under_two_names_is_encoded_once(self, cfg, tmp_path, encoded):
        shutil.copy(tmp_path / "videos" / "a.mp4", tmp_path / "videos" / "copy.mp4")
        (tmp_path / "videos" / "copy.txt").write_text("another caption")
        manifest = prepare(cfg)
        assert encoded == []
        assert {scene.name: scene.shard for scene in manifest.scenes} == {"a.mp4#0": 0, "b.mp4#0": 1, "copy.mp4#0": 0}

    def test_a_file_of_which_nothing_is_used_is_not_decoded_again(self, cfg, tmp_path, decoded):
        make_videos(tmp_path, short=(5,))
        (tmp_path / "videos" / "broken.mp4").write_bytes(b"x" * 999)
        cfg = with_data(cfg, min_shot_frames=9)
        skipped = prepare(cfg).skipped
        assert skipped.keys() == {"short.mp4", "broken.mp4"}
        decoded.clear()
        make_videos(tmp_path, c=(21,))
        assert prepare(cfg).skipped == skipped
        assert decoded == ["c.mp4"]

    def test_a_picture_is_a_shot_of_one_token(self, cfg, tmp_path):
        """However long the shots of videos have to be."""
        PIL.Image.fromarray(np.full((16, 24, 3), 99, np.uint8)).save(tmp_path / "videos" / "red.png")
        for patch, frames in ((1, 1), (2, 2)):
            small = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, patch=(patch, 1, 1)))
            manifest = prepare(with_data(small, stills=True, min_shot_frames=9))
            (scene,) = [scene for scene in manifest.scenes if scene.source == "red.png"]
            assert [shot.frames for shot in scene.shots] == [frames]

    def test_a_newer_decoder_may_read_what_an_older_one_did_not(self, cfg, tmp_path, decoded, monkeypatch):
        (tmp_path / "videos" / "broken.mp4").write_bytes(b"x" * 999)
        prepare(cfg)
        decoded.clear()
        make_videos(tmp_path, c=(21,))
        monkeypatch.setattr("av.__version__", "99")
        prepare(cfg)
        assert sorted(decoded) == ["broken.mp4", "c.mp4"]

    def test_a_disk_that_fails_is_asked_again(self, cfg, tmp_path, monkeypatch):
        make_videos(tmp_path, c=(21,))
        shots_of = work_module.shots_of

        def failing(source, *arguments, **options):
            if source.name == "c.mp4":
                try:
                    raise OSError(5, "Input/output error")
                except OSError as error:
                    raise VideoError(source.path, "it cannot be decoded (Input/output error)") from error
            return shots_of(source, *arguments, **options)

        monkeypatch.setattr(work_module, "shots_of", failing)
        assert prepare(cfg).skipped == {"c.mp4": "it cannot be decoded (Input/output error)"}
        monkeypatch.setattr(work_module, "shots_of", shots_of)
        assert not prepare(cfg, check=True).skipped


class TestCodec:
    def test_of_the_cache_is_used_until_another_is_asked_for(self, tmp_path, encoded):
        make_videos(tmp_path, a=(13,), b=(13,))
        cfg = small_config(tmp_path)
        first = prepare(cfg)
        make_videos(tmp_path, c=(29,))
        second = prepare(cfg)
        assert second.codec_fingerprint == first.codec_fingerprint
        encoded.clear()
        third = prepare(with_data(cfg, refit_codec=True))
        assert third.codec_fingerprint != first.codec_fingerprint
        assert sorted(encoded) == ["a.mp4", "b.mp4", "c.mp4"]
        assert prepare(cfg) == prepare(with_data(cfg, refit_codec=True)) == third  # fitted on the same, it is the same
        assert codec_of(first).fingerprint == first.codec_fingerprint  # what was prepared before has its own

    def test_of_other_settings_is_another(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        prepare(cfg)
        other = dataclasses.replace(cfg, codec=dataclasses.replace(cfg.codec, whiten=0.1))
        assert not any("fitted before" in note for note in prepare(other).notes)
        assert not any("fitted before" in note for note in prepare(with_data(cfg, fps=6.0)).notes)

    def test_that_is_damaged_is_named(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        prepare(cfg)
        (file,) = (tmp_path / "cache" / "codecs").iterdir()
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(DataError, match=rf"{file} cannot be read .*put it back, or .*--data.refit-codec True"):
            prepare(cfg)
        assert prepare(with_data(cfg, refit_codec=True)).counts["files"] == 1

    def test_videos_are_decoded_once(self, tmp_path, decoded):
        make_videos(tmp_path, a=(13,), b=(13,))
        make_videos(tmp_path / "held", c=(21,))
        prepare(small_config(tmp_path, validation_source=(str(tmp_path / "held" / "videos"),)))
        assert sorted(decoded) == ["a.mp4", "b.mp4", "c.mp4"]
        assert not list((tmp_path / "cache" / "waiting").iterdir())

    def test_is_fitted_on_no_more_than_may_wait(self, tmp_path, decoded, monkeypatch):
        """The rest is decoded once, too, when it is there; names do not decide which those are."""
        make_videos(tmp_path, **{f"v{k}": (13,) for k in range(5)})
        monkeypatch.setattr(work_module, "_FITTED", 20 * 8 * 12 * 3)
        manifest = prepare(small_config(tmp_path))
        assert sorted(decoded) == [f"v{k}.mp4" for k in range(5)]
        used = sorted(manifest.sources, key=manifest.sources.get)[:2]
        alone = tmp_path / "alone"
        (alone / "videos").mkdir(parents=True)
        for number, name in enumerate(sorted(used)):
            shutil.copy(tmp_path / "videos" / name, alone / "videos" / f"{number}.mp4")
        assert prepare(small_config(alone)).codec_fingerprint == manifest.codec_fingerprint

    @pytest.fixture
    def added(self, monkeypatch):
        """The groups of clips that are added up, of one clip each."""
        monkeypatch.setattr(work_module, "_group_bytes", lambda codec: 1)
        groups, method = [], Work._sum
        monkeypatch.setattr(Work, "_sum", lambda self, clips: groups.append(clips) or method(self, clips))
        return groups

    def test_that_is_killed_while_it_is_fitted_goes_on_and_has_the_same_bits(self, tmp_path, added, monkeypatch):
        """Also with names in another order, and where the disk lost a part."""
        make_videos(tmp_path, **{f"v{k}": (13, 21) for k in range(3)})
        alone = prepare(small_config(tmp_path))
        groups, method = len(added), Work._sum
        for k, name in enumerate(("z", "y", "x")):
            (tmp_path / "videos" / f"v{k}.mp4").rename(tmp_path / "videos" / f"{name}.mp4")
        kept = small_config(tmp_path, cache=str(tmp_path / "another"))

        def killed(self, clips):
            if len(added) == groups + 3:
                raise KeyboardInterrupt
            method(self, clips)

        with monkeypatch.context() as until_then:
            until_then.setattr(Work, "_sum", killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(kept, part=(1, 2))
        damaged, *_ = (tmp_path / "another" / "waiting").glob("*.npz")
        damaged.write_bytes(damaged.read_bytes()[:-99])
        again = prepare(kept, part=(0, 2))
        assert again.codec_fingerprint == alone.codec_fingerprint
        assert sorted(shard.sha256 for shard in again.shards) == sorted(shard.sha256 for shard in alone.shards)
        assert len(added) == 2 * groups  # each once
        assert not list((tmp_path / "another" / "waiting").iterdir())

    @pytest.mark.parametrize("stride", [(4, 4, 4), (4, 8, 8), (4, 16, 16)])
    def test_is_fitted_in_parts_that_are_no_larger_on_the_disk_than_twice_their_frames(self, stride):
        cfg = PcaConfig(stride=stride, channels=16)
        written = sum(array.nbytes for array in sums_of(cfg, ()).values())
        assert 8 << 20 <= work_module._group_bytes(cfg) <= max(8 << 20, written)
        assert written <= 2 * work_module._group_bytes(cfg)

    def test_clips_are_added_up_while_another_process_reads(self, tmp_path, added, monkeypatch):
        """It reads the last video, and dies, which frees its claim."""
        monkeypatch.setattr(work_module, "_SHORTEST_LOOK", 0.01)
        make_videos(tmp_path, a=(13,), b=(13,), c=(13,))
        cfg = small_config(tmp_path)
        *first, last = sorted(find_sources(cfg.data), key=lambda source: source.digest)
        held, claimed = Cache(tmp_path / "cache", cfg).waiting(last), work_module.claimed
        read, done, looks = Work._read, [], iter(range(99))
        monkeypatch.setattr(Work, "_read", lambda self, s: done.append((s.name, len(added))) or read(self, s))

        def busy(file):
            another = file == held and not added and next(looks, None) is not None
            return contextlib.nullcontext(False) if another else claimed(file)

        monkeypatch.setattr(work_module, "claimed", busy)
        prepare(cfg)
        assert dict(done) == {**{source.name: 0 for source in first}, last.name: 1}
        assert len(added) == 3

    def test_is_not_disturbed_by_other_settings(self, tmp_path, monkeypatch):
        """Their preparation begins and ends while frames wait for this codec."""
        make_videos(tmp_path, a=(13,), b=(13, 13))
        cfg, method = small_config(tmp_path), Work._groups
        others = dataclasses.replace(cfg, codec=dataclasses.replace(cfg.codec, whiten=0.1)), with_data(cfg, fps=6.0)
        expected = prepare(with_data(cfg, cache=str(tmp_path / "alone")))

        def groups(self, chosen):
            monkeypatch.setattr(Work, "_groups", method)
            for other in others:
                prepare(other)
            return method(self, chosen)

        reads, read = [], Work._read
        monkeypatch.setattr(Work, "_groups", groups)
        monkeypatch.setattr(Work, "_read", lambda self, source: reads.append(self) or read(self, source))
        assert prepare(cfg).shards == expected.shards
        assert [reads.count(work) for work in dict.fromkeys(reads)] == [2, 2, 2]

    def test_reads_again_what_another_preparation_removed(self, tmp_path, monkeypatch):
        """One that had a codec already encodes the same videos, and is done with the frames."""
        make_videos(tmp_path, a=(13,), b=(13, 13))
        cfg, method = small_config(tmp_path), Work._groups
        expected = prepare(with_data(cfg, cache=str(tmp_path / "alone")))
        codec = codec_of(prepare(with_data(cfg, fps=6.0, cache=str(tmp_path / "other"))))

        def groups(self, chosen):
            monkeypatch.setattr(Work, "_groups", method)
            prepare(cfg, codec)
            assert not list((tmp_path / "cache" / "waiting").iterdir())
            return method(self, chosen)

        monkeypatch.setattr(Work, "_groups", groups)
        assert prepare(cfg).shards == expected.shards

    def test_that_needs_no_fitting_makes_no_frames_wait(self, tmp_path, monkeypatch):
        monkeypatch.setitem(CODECS, MeanConfig, MeanCodec)
        monkeypatch.setattr(Work, "_read", lambda *_: pytest.fail("frames wait"))
        (tmp_path / "weights").write_bytes(WEIGHTS)
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        object.__setattr__(cfg, "codec", MeanConfig(file=str(tmp_path / "weights"), stride=(1, 4, 4)))
        assert prepare(cfg).counts["files"] == 1
        assert not (tmp_path / "cache" / "codecs").exists()


class TestDamage:
    @pytest.fixture
    def cfg(self, tmp_path):
        make_videos(tmp_path, a=(13,), b=(13, 13))
        return small_config(tmp_path)

    @pytest.mark.parametrize("kind", ["shortened", "removed", "not described", "described wrongly"])
    def test_what_is_not_whole_is_encoded_again_and_said(self, cfg, encoded, kind):
        first = prepare(cfg)
        before = latents(first)
        shard = first.shard_path(1)
        if kind == "shortened":
            shard.write_bytes(shard.read_bytes()[:-1])
        elif kind == "removed":
            shard.unlink()
        encoded.clear()
        if kind.endswith("described") or kind.endswith("wrongly"):
            described = shard.with_suffix(".json")
            described.write_text(described.read_text().replace("13", "17") if "wrongly" in kind else "")
            again = prepare(with_data(cfg, default_caption="another"))
        else:
            again = prepare(cfg)
        assert encoded == ["b.mp4"]
        assert any(f"{shard.name} " in note and "was encoded again" in note for note in again.notes)
        assert_same(latents(again), before)
        assert not any(damaged_shards(again))

    def test_a_changed_byte_is_found_when_all_is_read(self, cfg, encoded):
        first = prepare(cfg)
        before = latents(first)
        shard = first.shard_path(0)
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 255
        shard.write_bytes(content)
        encoded.clear()
        prepare(cfg)  # sizes alone are looked at
        assert encoded == []
        again = prepare(cfg, check=True)
        assert encoded == ["a.mp4"]
        assert any(
            "has another SHA-256 than when it was written; its video was encoded again" in n for n in again.notes
        )
        assert_same(latents(again), before)
        verify(again, range(2))


class TestSeveral:
    def test_what_was_complete_is_kept_when_a_preparation_ends(self, tmp_path, decoded, monkeypatch):
        """The second of three videos ends it; the next start makes that and the third."""
        make_videos(tmp_path, a=(13,), b=(13,), c=(13,))
        cfg = small_config(tmp_path)
        encode = Work._encode

        def killed(self, source, *rest):
            if source.name == "b.mp4":
                raise KeyboardInterrupt
            return encode(self, source, *rest)

        monkeypatch.setattr(Work, "_encode", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
        monkeypatch.setattr(Work, "_encode", encode)
        watched = []
        monkeypatch.setattr(Work, "_encode", lambda self, s, *rest: watched.append(s.name) or encode(self, s, *rest))
        manifest = prepare(cfg)
        assert watched == ["b.mp4", "c.mp4"]
        assert sorted(decoded) == ["a.mp4", "b.mp4", "c.mp4"]
        fresh = prepare(with_data(cfg, cache=str(tmp_path / "fresh")))
        assert_same(latents(manifest), latents(fresh))

    @pytest.mark.parametrize("part", [(0, 2), (1, 2), (2, 3)])
    def test_each_begins_elsewhere_and_takes_over_the_rest(self, tmp_path, encoded, part):
        names = [f"v{k}" for k in range(5)]
        folder = make_videos(tmp_path, **{name: (13,) for name in names})
        manifest = prepare(small_config(tmp_path), part=part)
        larger_first = sorted(manifest.sources, key=lambda name: -(folder / name).stat().st_size)
        turns = [*range(part[1]), *reversed(range(part[1]))] * 2
        own = [name for name, turn in zip(larger_first, turns) if turn == part[0]]
        assert encoded[: len(own)] == own
        assert sorted(encoded) == sorted(manifest.sources)

    def test_what_another_is_at_work_on_is_waited_for(self, tmp_path, encoded, monkeypatch):
        """Here it dies, which frees its claim."""
        monkeypatch.setattr(work_module, "_LOOK", 0.05)
        make_videos(tmp_path, a=(13,), b=(13,))
        cfg = small_config(tmp_path)
        prepare(cfg)
        shutil.rmtree(tmp_path / "cache" / "encoded")
        encoded.clear()
        seen, claimed, held = [], work_module.claimed, []

        def busy(file):
            if len(seen) < 4:  # another process holds the claim of the first file it is asked for
                held[:] = held or [file]
                if file == held[0]:
                    seen.append(file)
                    return cache_module.contextlib.nullcontext(False)
            return claimed(file)

        monkeypatch.setattr(work_module, "claimed", busy)
        assert prepare(cfg).counts["files"] == 2
        assert encoded == ["b.mp4", "a.mp4"]

    def test_two_processes_share_the_work(self, tmp_path, monkeypatch):
        """And end with the bits of one."""
        monkeypatch.setattr(work_module, "_group_bytes", lambda codec: 1)
        make_videos(tmp_path, **{f"v{k}": (13, 13, 13) for k in range(6)})
        cfg = small_config(tmp_path)
        alone = prepare(with_data(cfg, cache=str(tmp_path / "alone")))
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            first, second = pool.starmap(_prepare_part, [(cfg, (0, 2)), (cfg, (1, 2))])
        assert first[0] == second[0]
        assert (first[0].fingerprint, first[0].shards) == (alone.fingerprint, alone.shards)
        assert sorted(first[1] + second[1]) == sorted(first[0].sources)
        verify(first[0], range(6))

    def test_without_locks_it_is_done_all_the_same(self, tmp_path, monkeypatch):
        def unsupported(descriptor, operation):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(cache_module.fcntl, "flock", unsupported)
        make_videos(tmp_path, a=(13,))
        assert prepare(small_config(tmp_path)).counts["files"] == 1

    def test_what_a_dead_process_left_half_written_is_removed(self, tmp_path):
        make_videos(tmp_path, a=(13,))
        cfg = small_config(tmp_path)
        shard = prepare(cfg).shard_path(0)
        dead = [shard.with_name(f".{shard.name}.4194303.tmp"), tmp_path / "cache" / "waiting" / ".x.frames.4194303.tmp"]
        for file in dead:
            file.write_bytes(b"half")
        make_videos(tmp_path, b=(13,))
        prepare(cfg)
        assert not any(os.path.exists(file) for file in dead)


def _prepare_part(cfg, part):
    work_module._group_bytes = lambda codec: 1
    names, encode = [], Work._encode
    Work._encode = lambda self, s, *rest: names.append(s.name) or encode(self, s, *rest)
    return prepare(cfg, part=part), names
