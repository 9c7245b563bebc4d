"""A generation: a video that is made shot by shot, in a folder that knows how far it is.

    <folder>/generation.json        what is asked for: storyboards, settings, weights
             given/                 what storyboards named: pictures and videos
             shots/0007.npz         a shot that is done: latents, features, what it read
             shots/0007.mp4         the same to be watched; video.mp4 is all of them, joined
             run.lock               whose it is, while a process is at work

A shot is done when its .npz is there, which appears whole or not at all. So a process that was killed resumes with the
shot that it was at, and what it makes is the same, bit for bit. What is asked for again is a new file, `0007-2.npz`;
the one before stays where it is.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import moc_jax
from moc_jax.config import Config
from moc_jax.config_json import config_from_json, config_to_json
from moc_jax.errors import Failure
from moc_jax.files import remove_leftovers, whole_file, write_text
from moc_jax.reading import parse_json
from moc_jax.sampling.storyboard import (
    Shot,
    Storyboard,
    StoryboardError,
    file_digest,
    parse_storyboard,
    storyboard_digest,
)
from moc_jax.shapes import Float, Float32, Int
from moc_jax.showing import named, shown

FORMAT = 1
_FILE = "generation.json"


class GenerationError(Failure):
    """A folder that can't be continued: names it, the cause and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A shot that is done."""

    latents: Float32[np.ndarray, "F Y X Z"]
    features: Float32[np.ndarray, "depth H D"]
    """Mean of its keys, which says whether later shots read it; see `Sampler.features`."""
    read: Int[np.ndarray, " R"]
    """The shots that it was shown, from 0."""
    shares: Float[np.ndarray, "depth R"]
    """Of its picks, by layer, those that lie in each of these; without routing none."""


@dataclasses.dataclass(frozen=True)
class Take:
    """Shots that are sampled together, since each but the first continues the one before."""

    shots: range
    """From 0, of all of the generation's."""
    board: Storyboard
    """Whose they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Again:
    """What was asked for again last; shots are counted from 1."""

    shots: list[int]
    readers: list[int]
    """The later ones that read them."""
    too: bool
    """Whether these were asked for, too."""


class Generation:
    """The folder, opened by one process; all shots are counted from 0, but in messages from 1."""

    def __init__(self, folder: Path, config: Config, checkpoint: str, weights: str, step: int):
        """See `begin` and `resume`."""
        self.folder, self.config = folder, config
        self.checkpoint, self.weights, self.step = checkpoint, weights, step
        self.boards: list[Storyboard] = []
        self._written: list[dict[str, object]] = []  # of each storyboard
        self._takes: dict[int, int] = {}  # how often a shot was asked for, where that is more than once
        self._again: Again | None = None

    @property
    def shots(self) -> list[Shot]:
        """All that are asked for so far."""
        return [shot for board in self.boards for shot in board.shots]

    def takes(self) -> list[Take]:
        """In the order in which they are sampled."""
        found, at = list[Take](), 0
        for board in self.boards:
            begins = [s for s in range(len(board.shots)) if s == 0 or not _goes_on(*board.shots[s - 1 : s + 1])]
            found += [Take(range(at + a, at + b), board) for a, b in itertools.pairwise([*begins, len(board.shots)])]
            at += len(board.shots)
        return found

    def board_of(self, shot: int) -> Storyboard:
        """Whose it is."""
        for board in self.boards:
            if shot < len(board.shots):
                return board
            shot -= len(board.shots)
        raise IndexError(shot)

    def take(self, shot: int) -> int:
        """How often this shot was asked for."""
        return self._takes.get(shot, 1)

    # ---------------------------------------------------------------------------------------- what is asked for

    def extend(self, *boards: Storyboard) -> None:
        """Asks for more shots: of all of these, or of none. What a storyboard names is copied; it need not be kept.

        Raises:
            StoryboardError: it remembers or forgets a shot that isn't before it, or remembers more than it is shown.
            GenerationError: the folder can't be written.
        """
        before = len(self.shots)
        for board in boards:
            self._check_pins(board, before)
            before += len(board.shots)
        with self._written_to():
            for board in boards:
                shots = [*map(self._written_shot, board.shots)]
                fields: dict[str, object] = {"caption": board.caption, "negative_prompt": board.negative_prompt}
                fields |= {"seed": board.seed, "shots": shots}
                self._written.append({name: value for name, value in fields.items() if value is not None})
                self.boards.append(self._read_board(self._written[-1], board.name))
            self._again = None  # what is asked for again after this is another wish
            self._write()

    def _check_pins(self, board: Storyboard, before: int) -> None:
        most = self.config.sample.retrieve_shots
        for s, shot in enumerate(board.shots):
            if most and len(shot.remember) > most:
                raise StoryboardError(
                    f"{board.name}: shots[{s}].remember names {len(shot.remember)} shots, but sample.retrieve_shots is "
                    f"{most}"
                )
            for field, numbers in (("remember", shot.remember), ("forget", shot.forget)):
                if numbers and max(numbers) > before + s:
                    raise StoryboardError(
                        f"{board.name}: shots[{s}].{field} names shot {max(numbers)}, but this is shot {before + s + 1}"
                    )

    def ends_with(self, boards: Sequence[Storyboard]) -> bool:
        """Whether these are the shots that were asked for last: then the command that asked is run again."""
        last = self.boards[-len(boards) :]
        return [*map(storyboard_digest, last)] == [*map(storyboard_digest, boards)]

    def again(self, shots: Sequence[int], *, readers: bool = False) -> list[int]:
        """Asks for these shots again, with other noise, and for those of their takes; their files stay.

        While not all is done, asking for the same once more, and for nothing else in between, changes nothing: then the
        command that asked is run again.

        Args:
            readers: also for the later shots that read them.

        Returns:
            the later shots that read them.
        """
        asked = [shot + 1 for shot in shots]
        last = self._again
        if last and (last.shots, last.too) == (asked, readers) and not all(map(self.is_done, range(len(self.shots)))):
            return [number - 1 for number in last.readers]
        found = self.readers(self._with_takes(shots))
        for shot in self._with_takes([*shots, *(found if readers else [])]):
            self._takes[shot] = self.take(shot) + 1
        self._again = Again(shots=asked, readers=[reader + 1 for reader in found], too=readers)
        with self._written_to():
            self._write()
        return found

    def readers(self, shots: Sequence[int]) -> list[int]:
        """The later shots, of those that are done, that read these, and those that read such; of whose picks some lie
        there, that is: without routing, those that were shown them."""
        found = set(shots)
        for shot in range(min(found) + 1, len(self.shots)):
            if shot not in found and (done := self.done(shot)):
                read = np.isin(done.read, list(found))
                if done.shares[:, read].any() if done.shares.size else read.any():
                    found.add(shot)
        return sorted(found.difference(shots))

    def _with_takes(self, shots: Sequence[int]) -> list[int]:
        takes = [take.shots for take in self.takes() if not set(shots).isdisjoint(take.shots)]
        return [*itertools.chain.from_iterable(takes)]

    def _written_shot(self, shot: Shot) -> dict[str, object]:
        fields: dict[str, object] = {"caption": shot.caption, "seconds": shot.seconds, "seed": shot.seed}
        for name, path in (("image", shot.image), ("video", shot.video)):
            if path is not None:
                fields[name] = kept = f"{file_digest(path)}{path.suffix}"
                if not (self.folder / "given" / kept).exists():
                    with whole_file(self.folder / "given" / kept) as partial:
                        shutil.copyfile(path, partial)
        fields |= {"remember": list(shot.remember) or None, "forget": list(shot.forget) or None}
        fields |= {"cut": False} if shot.continues else {}
        return {name: value for name, value in fields.items() if value is not None}

    def _read_board(self, content: object, name: str) -> Storyboard:
        before = self.shots[-1] if self.boards else None
        return parse_storyboard(content, name=name, folder=self.folder / "given", before=before)

    # ---------------------------------------------------------------------------------------- what is done

    def done(self, shot: int) -> Done | None:
        """None: it isn't yet.

        Raises:
            GenerationError: its file is damaged.
        """
        path = self.file(shot, "npz")
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Done(**{field.name: arrays[field.name] for field in dataclasses.fields(Done)})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise GenerationError(
                f"{named(path)} is damaged ({error}): remove it to have shot {shot + 1} sampled again"
            ) from error

    def is_done(self, shot: int) -> bool:
        """Whether it is."""
        return self.file(shot, "npz").exists()

    def keep(self, shot: int, done: Done) -> None:
        """From here on it is done; raises GenerationError where the folder can't be written."""
        arrays = {field.name: getattr(done, field.name) for field in dataclasses.fields(Done)}
        with self._written_to(), whole_file(self.file(shot, "npz")) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def file(self, shot: int, suffix: str) -> Path:
        """Where a shot lies."""
        again = f"-{self.take(shot)}" if self.take(shot) > 1 else ""
        return self.folder / "shots" / f"{shot + 1:04}{again}.{suffix}"

    # ---------------------------------------------------------------------------------------- the folder

    @contextlib.contextmanager
    def _written_to(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GenerationError(
                f"{named(self.folder)} cannot be written: {error}; what is done stays. Mend that (free some space, for "
                "instance); then the same command goes on"
            ) from error

    def _write(self) -> None:
        tree = {
            "format": FORMAT,
            "moc_jax": moc_jax.__version__,
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "step": self.step,
            "takes": {str(shot + 1): count for shot, count in self._takes.items()},
            "again": self._again and dataclasses.asdict(self._again),
            "storyboards": self._written,
            "config": parse_json(config_to_json(self.config)),
        }
        write_text(self.folder / _FILE, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")

    def check_current(self) -> None:
        """Raises GenerationError where another process asked for something since this one opened it."""
        now = resume(self.folder)
        if (now._written, now._takes) != (self._written, self._takes):
            raise GenerationError(
                f"{named(self.folder)} was changed by another process meanwhile; give the command again"
            )

    def read(self, tree: Mapping[str, object]) -> None:
        """Takes over what `_write` wrote."""
        takes, boards = tree["takes"], tree["storyboards"]
        assert isinstance(takes, dict)
        assert isinstance(boards, list)
        self._takes = {int(shot) - 1: int(count) for shot, count in takes.items()}
        if again := tree.get("again"):
            assert isinstance(again, dict)
            self._again = Again(**again)
        for number, content in enumerate(boards):
            self._written.append(content)
            self.boards.append(self._read_board(content, f"{self.folder / _FILE}: storyboards[{number}]"))


def is_generation(folder: Path) -> bool:
    """Whether one was begun there."""
    return (folder / _FILE).exists()


def begin(folder: Path, config: Config, *, checkpoint: str, weights: str, step: int) -> Generation:
    """A new one; nothing is written before it is extended.

    Args:
        folder: need not exist.
        config: of the checkpoint, with what sampling has in its place.
        checkpoint: where the weights lie.
        weights: their `digest.weights_digest`.
        step: after which they were saved.

    Raises:
        GenerationError: there is one, or the folder holds something else.
    """
    if is_generation(folder):
        raise GenerationError(f"{named(folder)} was begun by another process meanwhile; give the command again")
    check_new(folder)
    return Generation(folder, config, checkpoint, weights, step)


def check_new(folder: Path) -> None:
    """Raises GenerationError where none can be begun: there is something else."""
    # What was stopped while it copied the first storyboard's files has left these.
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {"given", "run.lock"}):
        raise GenerationError(f"{named(folder)} exists and is not a generation; give the name of a new folder")


def resume(folder: Path) -> Generation:
    """The one in `folder`.

    Raises:
        GenerationError: there is none, it is damaged, or of another format.
    """
    path = folder / _FILE
    try:
        tree = parse_json(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"it is {shown(tree)}")
        if tree.get("format") != FORMAT:
            raise GenerationError(
                f"{named(path)} is of format {shown(tree.get('format'))}, by moc_jax {shown(tree.get('moc_jax'))}, but "
                f"moc_jax {moc_jax.__version__} reads format {FORMAT}; continue with the version that wrote it"
            )
        config = config_from_json(json.dumps(tree["config"]), name=f"{path}: config")
        generation = Generation(folder, config, tree["checkpoint"], tree["weights"], tree["step"])
        generation.read(tree)
    except FileNotFoundError as error:
        raise GenerationError(f"{named(folder)} holds no generation: {_FILE} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise GenerationError(f"{named(path)} is damaged: {error}") from error
    for inside in ("shots", "given"):
        remove_leftovers(folder / inside)
    return generation


def check_same(generation: Generation, weights: str, changed: Mapping[str, tuple[object, object]]) -> None:
    """Raises GenerationError where other weights or settings would continue it than began it.

    `changed`: settings that are asked for now, by name: what they were, and are.
    """
    if weights != generation.weights:
        raise GenerationError(
            f"{named(generation.folder)} was begun with other weights, whose digest is {generation.weights[:16]}…, and "
            f"not {weights[:16]}…; give --checkpoint and --step of those, or begin another folder"
        )
    for name, (old, new) in changed.items():
        raise GenerationError(
            f"{named(generation.folder)} was begun with {name} {shown(old)}, not {shown(new)}; leave it out, or begin "
            "another folder"
        )


def _goes_on(before: Shot, shot: Shot) -> bool:
    """Whether two shots are sampled together."""
    return shot.continues and not before.is_given and not shot.is_given


def numbers(shots: Sequence[int] | Iterator[int]) -> str:
    """As messages count them: `shot 3`, `shots 3, 4 and 7`."""
    names = [str(shot + 1) for shot in shots]
    return f"shot {names[0]}" if len(names) == 1 else f"shots {', '.join(names[:-1])} and {names[-1]}"
