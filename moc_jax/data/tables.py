"""Lists of videos with their captions: JSONL, CSV and JSON, whose columns are found by their names."""

import csv
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from moc_jax.data.captions import CaptionError, Content, parsed_cuts
from moc_jax.documents import DocumentError, checked_text, read_document
from moc_jax.reading import decode_text, parse_json
from moc_jax.showing import shown
from moc_jax.stories import frame_cuts

SUFFIXES = frozenset({".jsonl", ".csv", ".tsv"})
NAMES = frozenset({"metadata", "videos2caption"})
"""Of files that list the videos of the folder that they lie in, without the suffix; they may be .json, too."""
_MOST_BYTES = 1 << 20  # of a line
_NAMED = 20  # problems that a message lists
_NOTED = 100

# The names of a column, the one that is preferred first.
MEDIA = "media", "media_path", "video", "video_path", "file_name", "filename", "file", "file_path", "path", "image"
CAPTION = "caption", "text", "prompt", "cap", "description", "global_caption"
SHOTS = "shots", "shot_captions"
CUTS, CUT_FRAMES = ("cuts",), ("shot_cut_frames",)
SPLIT = "split", "subset"
WEIGHT = "weight", "repeat", "repeats", "num_repeats"
_SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("validation", "val", "valid", "test"), "validation")

Values = Mapping[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What a table, or a tar file's JSON, says about a video."""

    file: Path | None
    """None: nothing is said."""
    line: int | None
    """From 1; None: the file is about this video alone."""
    content: Content
    split: Literal["train", "validation"] | None
    weight: int
    """How often a scene of it is shown in an epoch."""

    @classmethod
    def silent(cls) -> "Row":
        """Nothing is said."""
        return cls(file=None, line=None, content=Content(), split=None, weight=1)

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.file) if self.line is None else f"{self.file}, line {self.line}"


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a file, each with its video's path as it is written there."""

    rows: tuple[tuple[str, Row], ...]
    notes: tuple[str, ...]


def is_table(path: Path, *, named: bool) -> bool:
    """Whether a file lists videos; `named`: by its suffix, for who named it, else by its whole name."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES | {".json"} or not (named or path.stem.lower() in NAMES):
        return False
    if named and suffix != ".json":
        return True
    try:  # in a folder, a file of such a name may speak of something else
        _, values = next(_values(path), (0, {}))
        return named or not path.stat().st_size or _column(values, MEDIA, {}) is not None
    except (DocumentError, OSError):
        return suffix != ".json"


def read_table(file: Path) -> Table:
    """All rows of a table.

    Raises:
        CaptionError: names the lines that cannot be used, each with its value and the fix.
    """
    rows, problems, notes = [], list[str](), dict[str, None]()
    try:
        for line, values in _values(file):
            try:
                media = _column(values, MEDIA, notes)
                if not isinstance(media, str) or not media.strip():
                    raise DocumentError(_no_media(values) if media is None else f"the video is {shown(media)}; name it")
                rows.append((media, row_of(values, file, line, notes)))
            except DocumentError as error:
                problems.append(f"{file}, line {line}: {error}")
    except (DocumentError, OSError) as error:
        problems.append(f"{file} cannot be read: {error}")
    if problems:
        more = [f"and {len(problems) - _NAMED:,} more"] * (len(problems) > _NAMED)
        raise CaptionError("\n".join([*problems[:_NAMED], *more]))
    if not rows:
        what = "lists no videos" if file.stat().st_size else "is empty (0 bytes)"
        raise CaptionError(f"{file} {what}; give a line for each, with a column {MEDIA[0]}, or delete the file")
    return Table(tuple(rows), tuple(f"{file}: {note}" for note in notes))


def row_of(values: Values, file: Path, line: int | None, notes: dict[str, None]) -> Row:
    """What the columns say, found by their names; which of several names was taken is noted.

    Raises:
        DocumentError: a value that cannot be.
    """
    shots, cuts = _column(values, SHOTS, notes), _column(values, CUTS, notes)
    frames = _column(values, CUT_FRAMES, notes)
    caption = _text(_column(values, CAPTION, notes), "the caption")
    if cuts is not None and frames is not None:
        raise DocumentError("it has both cuts, in seconds, and shot_cut_frames; keep one")
    shots = _list(shots, "shots") if shots is not None else []
    content = Content(
        caption=caption,
        shots=tuple(cast(str, _text(shot, f"shots[{k}]") or "") for k, shot in enumerate(shots)),
        cuts=None if cuts is None else parsed_cuts(_list(cuts, "cuts")),
        cut_frames=None if frames is None else frame_cuts(_list(frames, "shot_cut_frames"), "shot_cut_frames"),
    )
    content.check()
    split, weight = _column(values, SPLIT, notes), _column(values, WEIGHT, notes)
    if split is not None and str(split).strip().lower() not in _SPLITS:
        raise DocumentError(f"the split is {shown(split)}; it must be one of {', '.join(_SPLITS)}")
    return Row(
        file=file,
        line=line,
        content=content,
        split=None if split is None else cast(Literal["train"], _SPLITS[str(split).strip().lower()]),
        weight=1 if weight is None else _weight(weight),
    )


def _values(file: Path) -> Iterator[tuple[int, Values]]:
    suffix = file.suffix.lower()
    if suffix == ".json":
        content = read_document(file) if file.stat().st_size else []
        if not isinstance(content, list):
            raise DocumentError(f"it holds {shown(content)}; it must be a list of objects, one for each video")
        rows: Iterable[tuple[int, object]] = enumerate(content, start=1)
    elif suffix == ".jsonl":
        rows = _json_lines(file)
    else:
        yield from _csv_rows(file, "\t" if suffix == ".tsv" else ",")
        return
    for line, values in rows:
        if not isinstance(values, dict):
            raise DocumentError(f"it holds {shown(values)}; it must be an object with a key for each column", line)
        yield line, values


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as content:
        number = 0
        while data := content.readline(_MOST_BYTES + 1):
            number += 1
            if len(data) > _MOST_BYTES:
                raise DocumentError(f"it has more than {_MOST_BYTES:,} bytes, which is the limit", number)
            try:
                yield number, decode_text(data)
            except DocumentError as error:
                raise DocumentError(error.reason, number) from error


def _json_lines(file: Path) -> Iterator[tuple[int, object]]:
    for number, text in _lines(file):
        if text.strip():
            try:
                yield number, parse_json(text, deepest=20)
            except DocumentError as error:
                raise DocumentError(error.reason, number) from error


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[int, Values]]:
    reader = csv.reader((text for _, text in _lines(file)), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if wrong := _wrong_header(header, delimiter, file.parent):
            raise DocumentError(wrong, 1)
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DocumentError(
                    f"it has {len(cells)} cells, but the header has {len(header)}; put text with a {shown(delimiter)} "
                    "in double quotes",
                    reader.line_num,
                )
            if cells:
                yield reader.line_num, {name: cell for name, cell in zip(header, cells) if cell.strip()}
    except csv.Error as error:
        raise DocumentError(f"it is not CSV: {error}", reader.line_num) from error


def _wrong_header(header: Sequence[str], delimiter: str, folder: Path) -> str:
    """What is wrong with a first line, and the fix; empty if nothing is, or if it may be of something else."""
    if len(set(header)) < len(header):
        return f"its header {shown(header)} names a column twice; rename one"
    if any(name.lower() in MEDIA for name in header):
        return ""
    for other in ",;\t|":
        if any(name.strip(' "').lower() in MEDIA for name in delimiter.join(header).split(other)):
            kind = "tabs" if delimiter == "\t" else "commas"
            return f"its cells are separated by {shown(other)}; save it with {kind} between them"
    if any(Path(name).suffix and (folder / name).is_file() for name in header):
        example = delimiter.join((MEDIA[0], CAPTION[0]))
        return f"it has no header: its first line is {shown(header)}; put one before it, such as {example}"
    return ""


def _column(values: Values, names: Sequence[str], notes: dict[str, None]) -> object:
    """The value of the first of these columns that there is; None if there is none."""
    known = {key.strip().lower(): key for key in values if values[key] is not None}
    found = [known[name] for name in names if name in known]
    if len(found) > 1 and len(notes) < _NOTED:
        notes[f"{found[0]} is taken, not {' or '.join(found[1:])}"] = None
    return values[found[0]] if found else None


def _no_media(values: Values) -> str:
    near = difflib.get_close_matches(MEDIA[0], [str(key)[:60] for key in values], n=1)
    hint = f"; did you mean {near[0]} by {MEDIA[0]}?" if near else f"; it has {shown(sorted(values))}"
    return f"no column names the video; call it {MEDIA[0]}, or one of {', '.join(MEDIA[1:])}{hint}"


def _text(value: object, what: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DocumentError(f"{what} is {shown(value)}; it must be text")
    try:
        return checked_text(" ".join(value.split()))
    except DocumentError as error:
        raise DocumentError(f"{what}: {error}") from error


def _list(value: object, what: str) -> list[object]:
    """In a cell of CSV, a list is JSON."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = parse_json(value)
        except DocumentError as error:
            raise DocumentError(f"{what} is {shown(value)}; it must be a list in JSON, such as [1.5, 3]") from error
    if not isinstance(parsed, list):
        raise DocumentError(f"{what} is {shown(value)}; it must be a list")
    return parsed


def _weight(value: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or not 1 <= int(text[:9]) <= 1000 or len(text) > 4:
        raise DocumentError(f"the weight is {shown(value)}; it must be a whole number in 1..1000")
    return int(text)
