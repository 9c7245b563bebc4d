"""Videos and encoded data in a bucket, on a server of this machine."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest

from moc_jax import cloud
from moc_jax.config import ConfigError
from moc_jax.data import copies
from moc_jax.data import work as work_module
from moc_jax.data.copies import BucketFile, copy_of
from moc_jax.data.known import known_data
from moc_jax.data.manifest import MANIFEST, DataError
from moc_jax.data.pipeline import make_pipeline
from moc_jax.data.prepare import prepare
from moc_jax.data.shards import ShardReader
from moc_jax.data.sources import find_sources
from tests.clouds import storage
from tests.data.small import assert_same, encoded, latents, make_videos, small_config, with_data

__all__ = ["encoded", "storage"]
pytestmark = pytest.mark.usefixtures("storage")


@pytest.fixture
def bucket(request):
    """A folder for this test alone."""
    return f"gs://bucket/{request.node.name}"


@pytest.fixture
def requests(monkeypatch):
    """The addresses that are fetched whole."""
    addresses, download = [], cloud.download
    monkeypatch.setattr(cloud, "download", lambda found, file: addresses.append(found.address) or download(found, file))
    return addresses


def put(folder, address):
    """All files of a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            cloud.upload(file, f"{address}/{file.relative_to(folder)}")


def forget():
    """As on another host: nothing was copied yet."""
    shutil.rmtree(copies._root(), ignore_errors=True)


def names(address):
    return [found.address.removeprefix(f"{address}/") for found in cloud.below(address)]


class TestSources:
    def test_a_folder_is_what_it_is_on_a_disk(self, tmp_path, bucket, requests):
        videos = make_videos(tmp_path, a=(13,), b=(13, 13))
        (videos / "a.yaml").write_text("caption: of a")
        (videos / "notes.pdf").write_text("other")
        cfg = small_config(tmp_path, validation_fraction=0.5)
        put(videos, bucket)
        here, there = find_sources(cfg.data), find_sources(with_data(cfg, source=(bucket,)).data)

        def known(source):
            return source.name, source.digest, source.split, source.captions.caption, source.captions.shots

        assert list(map(known, there)) == list(map(known, here))
        assert requests == [f"{bucket}/a.yaml"]
        assert any("1 other file not taken as video: 1 .pdf" in note for note in there.notes)

    def test_videos_are_fetched_once_while_others_are_encoded(self, tmp_path, bucket, requests, monkeypatch):
        put(make_videos(tmp_path, a=(13,), b=(13,), c=(13,), d=(13,)), bucket)
        cfg = small_config(tmp_path, source=(bucket,))
        wanted, want = [], work_module.Ahead.want

        def watched(self, items):
            items = list(items)
            wanted.append([item.name for item in items])
            want(self, items)

        monkeypatch.setattr(work_module.Ahead, "want", watched)
        manifest = prepare(cfg)
        assert len(wanted[0]) == 3
        assert sorted(requests) == [f"{bucket}/{name}.mp4" for name in "abcd"]
        assert_same(latents(manifest), latents(prepare(with_data(cfg, source=(str(tmp_path / "videos"),)))))
        requests.clear()
        prepare(with_data(cfg, cache=str(tmp_path / "another")))
        assert requests == []

    def test_what_changed_is_fetched_again_and_noted(self, tmp_path, bucket):
        videos = make_videos(tmp_path, a=(13,), b=(13,))
        (videos / "b.txt").write_text("of b")
        put(videos, bucket)
        cfg = small_config(tmp_path, source=(bucket,))
        before = prepare(cfg)
        cloud.upload(videos / "a.mp4", f"{bucket}/b.mp4")
        cloud.remove(f"{bucket}/b.txt")
        sources = find_sources(cfg.data)
        assert f"changed in the bucket, and fetched again: {bucket}/b.mp4" in sources.notes
        assert len({source.digest for source in sources}) == 1
        assert [source.captions.caption for source in sources] == ["a video"] * 2
        after = latents(prepare(cfg))
        np.testing.assert_array_equal(after["b.mp4#0"][0], after["a.mp4#0"][0])
        assert not np.array_equal(after["b.mp4#0"][0], latents(before)["b.mp4#0"][0])

    def test_tables_and_tar_files(self, tmp_path, bucket, requests):
        videos = make_videos(tmp_path, a=(13,), b=(13,), c=(13,))
        cloud.upload(videos / "a.mp4", f"{bucket}/list/videos/a.mp4")
        cloud.upload(videos / "b.mp4", f"{bucket}/elsewhere/b.mp4")
        lines = [{"video": "videos/a.mp4", "caption": "one"}, {"video": f"{bucket}/elsewhere/b.mp4", "caption": "two"}]
        table = "".join(json.dumps(line) + "\n" for line in lines)
        cloud.write(f"{bucket}/list/all.jsonl", table.encode())
        with tarfile.open(tmp_path / "some.tar", "w") as tar:
            tar.add(videos / "c.mp4", "c.mp4")
        cloud.upload(tmp_path / "some.tar", f"{bucket}/some.tar")
        given = f"{bucket}/list/all.jsonl", f"{bucket}/some.tar"
        cfg = small_config(tmp_path, source=given)
        sources = find_sources(cfg.data)
        assert [source.captions.caption for source in sources] == ["one", "two", "a video"]
        assert sorted(requests) == sorted(given)
        (tmp_path / "here.jsonl").write_text(json.dumps(lines[1]))  # a table on a disk, of videos in a bucket
        (here,) = find_sources(with_data(cfg, source=(str(tmp_path / "here.jsonl"),)).data)
        assert (here.digest, here.name) == (sources[1].digest, f"{bucket}/elsewhere/b.mp4")
        assert len(prepare(cfg).scenes) == 3

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("gs://nowhere/videos", "data.source: gs://nowhere/videos does not exist; check its spelling"),
            (
                "gs://bucket/typo",
                "data.source: gs://bucket/typo does not exist: there is neither an object nor",
            ),
            ("gs://bucket/../x", "has a part that no path can have"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, tmp_path, address, message):
        with pytest.raises(ConfigError, match=message):
            prepare(small_config(tmp_path, source=(address,)))

    def test_without_the_packages_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
        monkeypatch.delattr("google.cloud.storage")
        cloud._client.cache_clear()
        with pytest.raises(ConfigError, match=r"data\.source: .* pip install 'moc_jax\[gcs\]'"):
            prepare(small_config(tmp_path, source=("gs://bucket/videos",)))
        with pytest.raises(ConfigError, match=r"data\.cache: .* pip install 'moc_jax\[gcs\]'"):
            prepare(small_config(tmp_path, cache="gs://bucket/cache"))

    def test_a_video_that_is_replaced_meanwhile_ends_the_preparation(self, tmp_path, bucket, monkeypatch):
        put(make_videos(tmp_path, a=(13,)), bucket)

        def replaced(found, file):  # the server here does not look at the condition
            raise cloud.ChangedError(f"{found.address} was changed")

        monkeypatch.setattr(cloud, "download", replaced)
        with pytest.raises(cloud.CloudError, match=r"a\.mp4 was changed: run the same command again"):
            prepare(small_config(tmp_path, source=(bucket,)))

    def test_names_that_no_path_can_have_are_left_out(self, tmp_path, bucket):
        put(make_videos(tmp_path, a=(13,)), bucket)
        assert copies.files_of([cloud.CloudObject(address=f"{bucket}/../x.mp4", size=1, generation=1)]) == {}

    def test_names_are_the_same_on_all_hosts(self, tmp_path, bucket, monkeypatch):
        videos = make_videos(tmp_path, a=(13,), b=(13,))
        cloud.upload(videos / "a.mp4", f"{bucket}/1/x.mp4")
        cloud.upload(videos / "b.mp4", f"{bucket}/2/x.mp4")
        for host in "ab":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
            sources = find_sources(small_config(tmp_path, source=(f"{bucket}/1", f"{bucket}/2")).data)
            assert [source.name for source in sources] == [f"{bucket}/1/x.mp4", f"{bucket}/2/x.mp4"]


class TestCache:
    @pytest.fixture
    def cfg(self, tmp_path, bucket):
        make_videos(tmp_path, a=(13,), b=(13, 13))
        return small_config(tmp_path, cache=bucket)

    def test_another_host_finds_all_and_fetches_what_it_reads(self, tmp_path, cfg, bucket, encoded, requests):
        manifest = prepare(cfg)
        made = latents(manifest)
        assert_same(made, latents(prepare(with_data(cfg, cache=str(tmp_path / "cache")))))
        forget()
        encoded.clear()
        requests.clear()
        before = names(bucket)
        assert known_data(cfg, manifest.fingerprint) == manifest
        assert names(bucket) == before
        again = prepare(cfg)
        assert encoded == []
        assert not any(address.endswith((".array_record", ".mp4")) for address in requests)
        assert_same(latents(again), made)
        assert sum(address.endswith(".array_record") for address in requests) == 2
        requests.clear()
        assert_same(latents(prepare(cfg)), made)
        assert requests == []
        given = prepare(with_data(cfg, cache=f"{bucket}/{again.fingerprint}"))
        assert_same(latents(given), made)

    @pytest.mark.long
    def test_a_preparation_that_is_killed_resumes(self, cfg, bucket, encoded, monkeypatch):
        """At any request that writes: what the bucket has by then is whole, and another host makes the rest."""
        uploads, upload = [], cloud.upload

        def killed_after(number):
            def counted(file, address, **condition):
                if len(uploads) == number:
                    raise KeyboardInterrupt
                uploads.append(address)
                return upload(file, address, **condition)

            return counted

        prepare(with_data(cfg, cache=f"{bucket}/whole"))
        whole = [name for name in names(f"{bucket}/whole") if not name.startswith("captions")]
        for number in range(len(whole) + 1):
            root = f"{bucket}/{number}"
            uploads.clear()
            monkeypatch.setattr(cloud, "upload", killed_after(number))
            with pytest.raises(KeyboardInterrupt):
                prepare(with_data(cfg, cache=root))
            monkeypatch.setattr(cloud, "upload", upload)
            there = names(root)
            assert not any(name.endswith(MANIFEST) for name in there)
            records = [name for name in there if name.startswith("encoded") and name.endswith(".json")]
            assert all(name.replace(".json", ".array_record") in there for name in records)
            if elsewhere := number % 2:  # on another host
                forget()
            encoded.clear()
            manifest = prepare(with_data(cfg, cache=root))
            assert len(encoded) == 2 - len(records) if elsewhere else len(encoded) <= 2 - len(records)
            assert [name for name in names(root) if not name.startswith("captions")] == whole
            forget()
            assert len(latents(prepare(with_data(cfg, cache=root)))) == len(manifest.scenes)

    def test_of_two_hosts_the_first_codec_counts(self, tmp_path, cfg, bucket, monkeypatch):
        make_videos(tmp_path / "others", d=(13,), e=(13,), c=(9, 21))
        theirs = prepare(with_data(cfg, cache=f"{bucket}/theirs", source=(str(tmp_path / "others"),)))
        (first,) = [name for name in names(f"{bucket}/theirs") if name.startswith("codecs")]
        content, fit = cloud.read(f"{bucket}/theirs/{first}")[0], work_module.fit_sums
        fitted = []

        def slower(*arguments):  # meanwhile another host puts its own there
            cloud.write(f"{bucket}/{first}", content)
            fitted.append(fit(*arguments))
            return fitted[0]

        monkeypatch.setattr(work_module, "fit_sums", slower)
        manifest = prepare(cfg)
        assert cloud.read(f"{bucket}/{first}")[0] == content
        assert manifest.codec_fingerprint == theirs.codec_fingerprint != fitted[0].fingerprint

    def test_what_another_process_sends_meanwhile_stays(self, cfg, bucket, monkeypatch):
        """Between a process's look at what is here and its look at the bucket, and after."""
        root, below = copy_of(bucket), cloud.below
        root.mkdir(parents=True)

        def made(name):
            (root / name).write_text("x")
            copies.send(root / name)

        made("gone")
        cloud.remove(f"{bucket}/gone")

        def meanwhile(address, **how):
            made("between")
            found = below(address, **how)
            made("after")
            return found

        monkeypatch.setattr(cloud, "below", meanwhile)
        copies.pull(root)
        assert sorted(path.name for path in root.iterdir()) == ["after", "between"]

    def test_what_is_lost_in_the_bucket_is_made_again(self, cfg, bucket, encoded):
        manifest = prepare(cfg)
        encoded.clear()
        cloud.remove(f"{bucket}/{manifest.shards[1].file}")
        again = prepare(cfg)
        assert len(encoded) == 1
        assert any("is missing; its video was encoded again" in note for note in again.notes)
        assert f"{manifest.shards[1].file}" in names(bucket)

    def test_a_damaged_shard_is_noticed_when_it_is_fetched(self, cfg, bucket):
        manifest = prepare(cfg)
        shard = manifest.shards[0]
        content = bytearray(cloud.read(f"{bucket}/{shard.file}")[0])
        content[len(content) // 2] ^= 1
        cloud.write(f"{bucket}/{shard.file}", bytes(content))
        forget()
        manifest = prepare(cfg)
        with pytest.raises(DataError, match="SHA-256"):
            latents(manifest)
        repaired = prepare(with_data(cfg, verify="full"), check=True)
        assert len(latents(repaired)) == 2

    def test_training_reads_ahead_and_waits_for_no_more(self, tmp_path, cfg, requests, monkeypatch):
        make_videos(tmp_path, **{f"v{k:02}": (13,) for k in range(12)})
        cfg = dataclasses.replace(with_data(cfg, max_buckets=1), train=dataclasses.replace(cfg.train, batch_size=1))
        prepare(cfg)
        forget()
        manifest = prepare(cfg)
        requests.clear()
        monkeypatch.setattr("moc_jax.data.pipeline._FETCHED", 3)
        scenes = make_pipeline(cfg, manifest, split="train")
        first = next(scenes)
        scenes._ahead.close()
        assert 1 <= len(requests) <= 5  # the three of the window, and what Grain reads ahead
        batches = [first, *(next(scenes) for _ in range(5))]
        scenes.close()
        local = prepare(with_data(cfg, cache=str(tmp_path / "cache")))
        same = make_pipeline(cfg, local, split="train")
        for batch in batches:
            np.testing.assert_array_equal(batch.video, next(same).video)
        same.close()

    def test_a_full_disk_loses_what_was_unused_the_longest(self, cfg, monkeypatch):
        manifest = prepare(cfg)
        forget()
        manifest = prepare(cfg)
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: usage._replace(free=int(0.05 * usage.total)))
        reader = ShardReader(manifest)
        for scene in manifest.scenes:
            reader.read(scene)
        there = [manifest.shard_path(number).exists() for number in range(len(manifest.shards))]
        assert there == [False, True]
        assert (manifest.folder / MANIFEST).exists()
        assert len(latents(manifest)) == 2


def test_what_is_removed_between_two_requests_is_not_there(bucket, monkeypatch):
    """As the lock of a run that ends while another one starts."""
    look = cloud.look

    def removed(address):
        if found := look(address):
            cloud.remove(address)
        return found

    cloud.write(f"{bucket}/x", b"x")
    monkeypatch.setattr(cloud, "look", removed)
    assert cloud.read(f"{bucket}/x") is None


def test_paths_of_copies(tmp_path):
    path = copy_of("gs://bucket/a/b.mp4")
    assert copies.address_of(path) == "gs://bucket/a/b.mp4"
    assert copies.address_of(tmp_path) == ""
    file = BucketFile.of(cloud.CloudObject(address="gs://bucket/a/b.mp4", size=1, generation=2))
    assert os.fspath(file) == str(path)
    assert type(file.parent) is pathlib.PosixPath
