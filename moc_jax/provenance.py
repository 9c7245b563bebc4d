"""What made a video, in the video: an XMP packet that says that it is AI-generated, by which weights and from what.

    python -m moc_jax.provenance scene.mp4

XMP lies in an MP4 as a `uuid` box of its own (XMP specification, part 3, section 1.2.8). Other programs look for IPTC's
DigitalSourceType, AISystemUsed and AISystemVersionUsed, and for Dublin Core's description. It is a label, not a proof:
anybody can remove it.
"""

import argparse
import dataclasses
import json
import os
import struct
import sys
import typing
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from moc_jax.errors import Failure
from moc_jax.reading import parse_json
from moc_jax.showing import named, printable, shown

_XMP = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
_LONGEST = 1 << 20  # bytes of a packet
_SPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "moc": "urn:moc_jax:provenance:1",
}
_KINDS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_ALL_MADE, _PARTLY_MADE = f"{_KINDS}trainedAlgorithmicMedia", f"{_KINDS}compositeWithTrainedAlgorithmicMedia"


class ProvenanceError(Failure):
    """A file that doesn't say what made it: names the file and the cause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a video."""

    version: str
    """Of moc_jax."""
    weights: str
    """SHA-256 of the weights' digests, which model cards state as well; of public weights, of some of their numbers."""
    step: int
    """After which the weights were saved; 0: they come from elsewhere."""
    storyboard: str
    """SHA-256 of what the storyboard says, and of the files that it names."""
    seed: int
    settings: dict[str, object]
    """Of sampling and of attention."""
    partly_given: bool
    """Whether some of its frames were given, and not made."""

    def __str__(self) -> str:
        made = "AI-generated, but for frames that were given" if self.partly_given else "AI-generated"
        lines = [f"{made}, by moc_jax {printable(self.version)}"]
        lines += [f"weights: {printable(self.weights)}" + (f", step {self.step}" if self.step else "")]
        lines += [f"storyboard: {printable(self.storyboard)}", f"seed: {self.seed}"]
        return "\n".join([*lines, f"settings: {printable(json.dumps(self.settings))}"])


def read_provenance(path: str | os.PathLike) -> Provenance:
    """What made the MP4 at `path`.

    Raises:
        ProvenanceError: it can't be read, is not an MP4, or doesn't say.
    """
    try:
        with open(path, "rb") as file:
            packets = list(_packets(file))
    except OSError as error:
        raise ProvenanceError(f"{named(path)} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ProvenanceError(f"{named(path)}: {error}") from error
    if not packets:
        raise ProvenanceError(
            f"{named(path)} doesn't say what made it: there is no XMP in it, or another program removed it"
        )
    try:
        return _parsed(packets[-1])
    except (ElementTree.ParseError, ValueError) as error:
        raise ProvenanceError(f"{named(path)}: its XMP doesn't say what made it: {error}") from error


def append_provenance(path: Path, made: Provenance) -> None:
    """Puts it at the end of a finished MP4; raises OSError."""
    packet = _packet(made)
    with open(path, "ab") as file:
        file.write(struct.pack(">I4s16s", 24 + len(packet), b"uuid", _XMP) + packet)


def _packet(made: Provenance) -> bytes:
    for prefix, space in _SPACES.items():
        ElementTree.register_namespace(prefix, space)
    root = ElementTree.Element(_name("x:xmpmeta"))
    about = ElementTree.SubElement(ElementTree.SubElement(root, _name("rdf:RDF")), _name("rdf:Description"))
    for name, value in {
        "rdf:about": "",
        "xmp:CreatorTool": f"moc_jax {made.version}",
        "Iptc4xmpExt:DigitalSourceType": _PARTLY_MADE if made.partly_given else _ALL_MADE,
        "Iptc4xmpExt:AISystemUsed": "moc_jax",
        "Iptc4xmpExt:AISystemVersionUsed": made.version,
        **{f"moc:{field}": json.dumps(value) for field, value in dataclasses.asdict(made).items()},
    }.items():
        about.set(_name(name), value)
    words = ElementTree.SubElement(ElementTree.SubElement(about, _name("dc:description")), _name("rdf:Alt"))
    item = ElementTree.SubElement(words, _name("rdf:li"), {"{http://www.w3.org/XML/1998/namespace}lang": "x-default"})
    item.text = "AI-generated"
    text = ElementTree.tostring(root, encoding="unicode")
    begin = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    return f'{begin}\n{text}\n<?xpacket end="w"?>'.encode()


def _name(name: str) -> str:
    prefix, local = name.split(":")
    return f"{{{_SPACES[prefix]}}}{local}"


def _parsed(packet: bytes) -> Provenance:
    if b"<!" in packet:
        raise ValueError("it declares entities, which XMP doesn't have")
    about = ElementTree.fromstring(packet).find(f".//{_name('rdf:Description')}")
    said = {} if about is None else about.attrib
    return Provenance(
        version=_said(said, "version", str),
        weights=_said(said, "weights", str),
        step=_said(said, "step", int),
        storyboard=_said(said, "storyboard", str),
        seed=_said(said, "seed", int),
        settings=_said(said, "settings", dict),
        partly_given=_said(said, "partly_given", bool),
    )


def _said[T](said: Mapping[str, str], field: str, kind: type[T]) -> T:
    if (text := said.get(_name(f"moc:{field}"))) is None:
        raise ValueError("another program wrote it")
    value = parse_json(text)
    if type(value) is not kind:
        raise ValueError(f"{field} is {shown(value)}")
    return value


def _packets(file: typing.BinaryIO) -> Iterator[bytes]:
    """The XMP packets among the boxes of an MP4 (ISO/IEC 14496-12, section 4.2)."""
    end, at, first = file.seek(0, os.SEEK_END), 0, True
    while at < end:
        file.seek(at)
        size, kind = struct.unpack(">I4s", _exactly(file, 8))
        if first and kind != b"ftyp":
            raise ValueError("it is not an MP4")
        head, first = 8, False
        if size == 1:
            (size,), head = struct.unpack(">Q", _exactly(file, 8)), 16
        size = size or end - at  # 0: to the end
        if size < head or at + size > end:
            raise ValueError("it is cut off or damaged")
        if kind == b"uuid" and size >= head + 16 and _exactly(file, 16) == _XMP:
            if size > _LONGEST:
                raise ValueError(f"its XMP has {size:,} bytes; the limit is {_LONGEST:,}")
            yield _exactly(file, size - head - 16)
        at += size


def _exactly(file: typing.BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ValueError("it is not an MP4, or cut off")
    return data


def main(argv: Sequence[str]) -> None:
    """Prints what made each file."""
    parser = argparse.ArgumentParser(prog="python -m moc_jax.provenance", description="What made an MP4.")
    parser.add_argument("file", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file")
    args = parser.parse_args(argv)
    for file in args.file:
        made = read_provenance(file)
        if args.json:
            print(json.dumps({"file": str(file), **dataclasses.asdict(made)}))
        else:
            print(f"{named(file)}: {made}" if len(args.file) > 1 else made)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ProvenanceError as error:
        sys.exit(f"error: {error}")
