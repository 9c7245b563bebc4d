"""What may go wrong, and what lies behind an error that was wrapped on its way here: a full disk, too little memory."""

import errno
import functools
import re
from collections.abc import Callable, Iterator


class Failure(Exception):
    """What no setting is to blame for and was foreseen: programs report it in a line, and exit with 1."""


class PreviewError(Failure):
    """A preview that could not be made, or written; the run's processes are still in step, and can train on."""


_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED(?!.*larger than max)|out[ _]of[ _]memory|exceed(s|ed)? (hbm|vmem|smem|memory) capacity",
    re.IGNORECASE | re.DOTALL,
)
_AMOUNT = r"(\d+(?:\.\d+)?) ?(bytes|[KMGT]?i?B|[KMGT])?(?!\w)"
_ASKED = re.compile(rf"(?:allocat\w+|reserve|request for|Used) {_AMOUNT}")
_THERE = re.compile(rf"(?:Used \S+ of|There are|memory \(size=|limit of) ?{_AMOUNT}")


def disk_full(error: BaseException | None) -> bool:
    """Whether ENOSPC (or a quota) is the cause, however often the error was wrapped on its way here."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(word in str(cause) for word in ("No space left on device", "ENOSPC", "Disk quota exceeded"))
        for cause in _causes(error)
    )


def out_of_memory(error: BaseException | None) -> str | None:
    """What a device, or the compiler for it, was asked for and has, as far as XLA says; None for other errors."""
    for cause in _causes(error):
        text = str(cause)
        if type(cause).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _NO_MEMORY.search(text):
            asked, there = _ASKED.search(text), _THERE.search(text)
            needed = f"{_bytes(*asked.groups())} were asked for" if asked else text.splitlines()[0][:300]
            return needed + (f", and there are {_bytes(*there.groups())}" if there else "")
    return None


def explain_memory[**P, T](
    what: str, kind: type[Exception], remedies: Callable[..., str]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a method that runs on devices: where their memory is too small, `kind` says so.

    Args:
        what: completes "the devices' memory is too small for ...".
        remedies: of the method's object: which settings need less memory, and their present values.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                asked = None if isinstance(error, kind) else out_of_memory(error)
                if asked is None:
                    raise
                raise kind(
                    f"the devices' memory is too small for {what}: {asked}{_capacity()}. {remedies(args[0])}"
                ) from error

        return call

    return decorate


def _capacity() -> str:
    """What a device has in all, where the backend tells."""
    import jax  # command lines are read without it

    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f" ({device.device_kind} has {_bytes(str(limit), 'B')} for this process)" if limit else ""


def _bytes(amount: str, unit: str | None) -> str:
    """XLA's prefixes are powers of two, with or without an i."""
    size = float(amount)
    if unit and unit[0] in "KMGT":
        return f"{size:g} {unit[0]}iB"
    for prefix in ("", "Ki", "Mi", "Gi"):
        if size < 1024:
            return f"{size:.4g} {prefix}B"
        size /= 1024
    return f"{size:.4g} TiB"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on; of a group, those of each in it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _causes(inner)
        error = error.__cause__ or error.__context__


def root_cause(error: BaseException) -> str:
    """The innermost error: Orbax reports whatever fails on reading as a missing handler."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
