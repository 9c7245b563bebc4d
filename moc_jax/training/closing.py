"""Closing all that was opened, whatever goes wrong on the way."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def closing_all() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yields what takes a close, such as `file.close`; in the end every one is called, the newest first.

    The first error, the block's own before any close's, is raised; it carries the others as notes.
    """
    closes: list[Callable[[], None]] = []
    first: BaseException | None = None
    try:
        yield closes.append
    except BaseException as error:
        first = error
    for close in reversed(closes):
        try:
            close()
        except BaseException as error:
            if first is None:
                first = error
            elif error is not first:
                first.add_note(f"While closing: {type(error).__name__}: {error}")
    if first is not None:
        raise first
