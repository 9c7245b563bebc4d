"""What a video says about how it was made: written, read back, and read where it isn't or is damaged."""

import dataclasses
import json
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from moc_jax import provenance
from moc_jax.data import write_video
from moc_jax.provenance import Provenance, ProvenanceError, read_provenance

MADE = Provenance(
    version="1.2.3",
    weights="ab" * 32,
    step=900,
    storyboard="cd" * 32,
    seed=7,
    settings={"sample": {"solver": 'unipc" & <co>', "steps": 20, "shift": 3.0, "order": None}},
    partly_given=False,
)
FRAMES = np.zeros((3, 16, 16, 3), np.uint8)


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES, 12, MADE)
    return tmp_path / "a.mp4"


def test_a_video_says_what_made_it_and_plays_as_before(video, tmp_path):
    assert read_provenance(video) == MADE
    with av.open(str(video)) as file:
        assert len(list(file.decode(video=0))) == 3
    write_video(tmp_path / "plain.mp4", FRAMES, 12)
    assert video.read_bytes().startswith((tmp_path / "plain.mp4").read_bytes())


def test_other_programs_find_the_standard_fields(video):
    """The box and the packet as the XMP specification has them, by hand."""
    data = video.read_bytes()
    at = data.index(b"uuid\xbe\x7a\xcf\xcb\x97\xa9\x42\xe8\x9c\x71\x99\x94\x91\xe3\xaf\xac") - 4
    assert struct.unpack(">I", data[at : at + 4]) == (len(data) - at,)
    packet = data[at + 24 :].decode()
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert packet.endswith('<?xpacket end="w"?>')
    kind = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    for words in (f'DigitalSourceType="{kind}"', 'AISystemUsed="moc_jax"', 'AISystemVersionUsed="1.2.3"'):
        assert f"Iptc4xmpExt:{words}" in packet
    assert '<rdf:li xml:lang="x-default">AI-generated</rdf:li>' in packet


def test_given_frames_are_not_called_generated(tmp_path):
    write_video(tmp_path / "a.mp4", FRAMES, 12, dataclasses.replace(MADE, partly_given=True))
    assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in (tmp_path / "a.mp4").read_bytes()
    assert str(read_provenance(tmp_path / "a.mp4")).startswith("AI-generated, but for frames that were given, by moc")


def test_command(video, tmp_path, capsys):
    provenance.main([str(video)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["AI-generated, by moc_jax 1.2.3", f"weights: {MADE.weights}, step 900"]
    assert lines[2:4] == [f"storyboard: {MADE.storyboard}", "seed: 7"]
    provenance.main([str(video), str(video), "--json"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second == {"file": str(video), **dataclasses.asdict(MADE)}
    done = subprocess.run(
        [sys.executable, "-m", "moc_jax.provenance", tmp_path / "none.mp4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'none.mp4'} cannot be read: No such file or directory\n"


def _box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
FTYP = _box(b"ftyp", b"isom")
ODD = {
    "empty": (b"", "there is no XMP in it"),
    "no MP4": (b"RIFF1234AVI ", "it is not an MP4"),
    "short": (b"abc", "it is not an MP4, or cut off"),
    "cut": (FTYP + struct.pack(">I4s", 4000, b"mdat") + b"x" * 20, "cut off or damaged"),
    "small size": (FTYP + struct.pack(">I4s", 4, b"mdat"), "cut off or damaged"),
    "no XMP": (FTYP + _box(b"mdat", b"x" * 20), "there is no XMP in it"),
    "another uuid": (FTYP + _box(b"uuid", b"y" * 40), "there is no XMP in it"),
    "not XML": (FTYP + _box(b"uuid", XMP + b"<a>"), "no element found"),
    "entities": (FTYP + _box(b"uuid", XMP + b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'), "declares entities"),
    "another's": (FTYP + _box(b"uuid", XMP + b"<a/>"), "another program wrote it"),
    "large": (FTYP + _box(b"uuid", XMP + b" " * (1 << 20)), "the limit is 1,048,576"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_says_nothing_is_named(tmp_path, name):
    content, message = ODD[name]
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ProvenanceError, match=message) as raised:
        read_provenance(tmp_path / "a.mp4")
    assert str(tmp_path / "a.mp4") in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [("step", '"900"'), ("step", "{"), ("seed", "1.5"), ("settings", "[]")])
def test_wrong_values_are_errors(video, field, value):
    data = video.read_bytes().decode("latin-1")
    old = json.dumps(getattr(MADE, field)).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    old = old.replace(">", "&gt;")
    assert f'moc:{field}="{old}"' in data
    new = value.replace('"', "&quot;").ljust(len(old))
    changed = data.replace(f'moc:{field}="{old}"', f'moc:{field}="{new}"')
    grown = len(changed) - len(data)
    at = changed.index("uuid\xbe\x7a") - 4
    size = struct.unpack(">I", changed[at : at + 4].encode("latin-1"))[0] + grown
    changed = changed[:at] + struct.pack(">I", size).decode("latin-1") + changed[at + 4 :]
    video.write_bytes(changed.encode("latin-1"))
    with pytest.raises(ProvenanceError, match="its XMP doesn't say what made it"):
        read_provenance(video)


@pytest.mark.parametrize("size", [0, 1])
def test_other_forms_of_a_box_size(video, size):
    """To the end of the file, and in 64 bits."""
    data = video.read_bytes()
    at = data.index(b"uuid\xbe\x7a") - 4
    content = data[at + 8 :]
    long = struct.pack(">Q", 16 + len(content)) if size else b""
    video.write_bytes(data[:at] + struct.pack(">I4s", size, b"uuid") + long + content)
    assert read_provenance(video) == MADE
