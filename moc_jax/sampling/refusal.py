"""Captions that are not to be made: a filter of the user's may refuse them, with a reason.

A filter is a function, or a command that runs while captions are read. For each caption it reads a line of JSON,

    {"storyboard": "scene.yaml", "place": "shots[1].caption", "caption": "the finish line"}

and prints one, {"allowed": true} or {"allowed": false, "reason": "..."}, before it reads the next.
"""

from collections.abc import Callable, Iterator, Sequence

from moc_jax.dialogue import Dialogue
from moc_jax.reading import DocumentError
from moc_jax.sampling.storyboard import Storyboard, StoryboardError
from moc_jax.showing import printable, shown

CaptionFilter = Callable[[str], str | None]
"""Caption -> why it is refused; None: it is not."""


class FilterError(StoryboardError):
    """A filter that doesn't answer: nothing is sampled then."""


def check_captions(boards: Sequence[Storyboard], refused: CaptionFilter) -> None:
    """Shows the filter every caption of scenes and shots; what to steer away from is none.

    Raises:
        StoryboardError: it refuses one: names the storyboard, the place and the reason.
    """
    for board in boards:
        for place, caption in _captions(board):
            if (reason := refused(caption)) is not None:
                raise _refusal(board, place, reason)


def check_by_command(boards: Sequence[Storyboard], command: str) -> None:
    """`check_captions` by a command; an empty one refuses nothing.

    Raises:
        StoryboardError: as there; FilterError: it can't be run, ends early, or answers something else.
        ConfigError: the command cannot be split into words.
    """
    if not command:
        return
    with Dialogue(command, setting="--caption-filter", error=FilterError) as dialogue:
        for board in boards:
            for place, caption in _captions(board):
                question: dict[str, object] = {"storyboard": board.name, "place": place, "caption": caption}
                reason = dialogue.ask(question, f"{place} of {printable(board.name)}", _reason)
                if reason is not None:
                    raise _refusal(board, place, reason)


def _captions(board: Storyboard) -> Iterator[tuple[str, str]]:
    yield "caption", board.caption
    yield from ((f"shots[{s}].caption", shot.caption) for s, shot in enumerate(board.shots))


def _refusal(board: Storyboard, place: str, reason: str) -> StoryboardError:
    return StoryboardError(f"{printable(board.name)}: {place} is refused: {printable(reason)}; give another one")


def _reason(answer: object) -> str | None:
    if isinstance(answer, dict):
        allowed, reason = answer.get("allowed"), answer.get("reason")
        if allowed is True:
            return None
        if allowed is False and isinstance(reason, str) and reason.strip():
            return " ".join(reason.split())
    raise DocumentError(
        f'it answered {shown(answer)}; it must print {{"allowed": true}} or {{"allowed": false, "reason": "..."}}'
    )
