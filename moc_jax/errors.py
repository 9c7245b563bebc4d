"""What lies behind an error that was wrapped on its way here."""

import errno


def disk_full(error: BaseException | None) -> bool:
    """Whether ENOSPC (or a quota) is the cause, however often the error was wrapped on its way here."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(word in str(error) for word in ("No space left on device", "ENOSPC", "Disk quota exceeded")):
            return True
        if isinstance(error, BaseExceptionGroup):
            return any(disk_full(inner) for inner in error.exceptions)
        error = error.__cause__ or error.__context__
    return False


def root_cause(error: BaseException) -> str:
    """The innermost error: Orbax reports whatever fails on reading as a missing handler."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
