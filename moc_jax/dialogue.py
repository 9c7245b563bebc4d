"""Questions to a command of the user's while it runs: a line of JSON each, answered by a line of JSON."""

import contextlib
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from typing import IO

from moc_jax.config import ConfigError
from moc_jax.reading import DocumentError, parse_json
from moc_jax.showing import shown

_LONGEST = 1 << 20  # bytes of an answer


class Dialogue:
    """The command while it runs; a context manager."""

    def __init__(self, command: str, *, setting: str, error: type[Exception]):
        """`setting` is what the user gave the command by; `error` is raised when it does not answer.

        Raises:
            ConfigError: the command cannot be split into words.
        """
        self._setting, self._error = setting, error
        try:
            self._words = shlex.split(command)
        except ValueError as cause:
            raise ConfigError(f"{setting} {shown(command)} cannot be split into words: {cause}") from cause
        if not self._words:
            raise ConfigError(f"{setting} {shown(command)} names no command")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Dialogue":
        errors = self._stack.enter_context(tempfile.TemporaryFile())
        try:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self._process = subprocess.Popen(self._words, **pipes)
        except OSError as cause:
            self._stack.close()
            raise self._error(f"{self._setting} {shown(self._words[0])} cannot be run: {cause.strerror}") from cause
        self._errors: IO[bytes] = errors
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def ask[T](self, question: dict[str, object], about: str, read: Callable[[object], T]) -> T:
        """What `read` makes of the answer.

        Args:
            about: what the question is about, for errors.
            read: raises DocumentError for an answer that is none.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline(_LONGEST)
        except OSError:
            answer = b""
        try:
            if not answer:
                raise DocumentError("it ended without an answer")
            return read(parse_json(answer))
        except DocumentError as cause:
            raise self._error(f"{self._setting}, asked about {about}: {cause}{self._said()}") from cause

    def _said(self) -> str:
        """The last that it wrote to its standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1]})" if lines else ""
