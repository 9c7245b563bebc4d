"""Whether shards are what was written: compared all at once, or in the background while they are read."""

import threading
import time
from collections.abc import Sequence

from moc_jax.data.manifest import DataError, Manifest, verify


class Check:
    """Compares shards with their digests, each once."""

    def __init__(self, manifest: Manifest, shards: Sequence[int]):
        """`shards`: their numbers."""
        self._manifest, self._shards = manifest, shards
        self._done = 0
        self._damage: DataError | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def now(self) -> None:
        """Raises DataError, naming it, where a shard is damaged."""
        verify(self._manifest, self._shards[self._done :])
        self._done = len(self._shards)

    def in_background(self) -> None:
        """Begins or continues, in a thread that rests as long as it works.

        Raises:
            DataError: a shard that was looked at is damaged.
        """
        if self._damage is not None:
            raise self._damage
        if self._thread is None and self._done < len(self._shards):
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="checking shards", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the shard that it looks at."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while self._done < len(self._shards) and not self._stop.is_set():
            begin = time.monotonic()
            try:
                verify(self._manifest, self._shards[self._done : self._done + 1], shown=False)
            except DataError as error:
                self._damage = error
                return
            self._done += 1
            self._stop.wait(time.monotonic() - begin)
