"""Programs that are compiled in a thread: what the first step needs while the state is made, and later what the next
stage of the chunk schedule needs while the one before it trains.
"""

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
from jax.sharding import Mesh

from moc_jax.compilation import find_program, keep_program
from moc_jax.config import BucketConfig, MoCConfig, Stage
from moc_jax.errors import root_cause
from moc_jax.processes import gather, together
from moc_jax.training.stop import RunStop
from moc_jax.training.summary import si

_LAG = 2  # steps whose results are not waited for, so that the devices always have the next one at hand


def lag(mesh: Mesh) -> int:
    """How many steps may be under way at once.

    Several CPU devices share one pool of threads, and two programs that wait for each other's share there never end.
    """
    return 0 if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else _LAG


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A program to compile."""

    what: str
    """In words: "the step for 48 frames"."""
    made_of: object
    devices: Sequence[jax.Device]
    """See `find_program`."""
    build: Callable[[], jax.stages.Compiled]


class Asked:
    """A program that was asked for: compiled, or failed, when `result` is done."""

    def __init__(self, wanted: Wanted, *, ahead: bool):
        """`ahead`: something else is running meanwhile."""
        self.wanted, self.ahead, self.result = wanted, ahead, Future[jax.stages.Compiled]()


class Programs:
    """One thread compiles one program after another, in the order in which they are asked for.

    Of several processes all ask in the same order, whatever is ready where: compilers that wait for what those of the
    other processes measured wait for the same program.
    """

    def __init__(self, stop: RunStop) -> None:
        self._stop, self._number = stop, 0
        self._queue, self._news = queue.SimpleQueue[Asked | None](), queue.SimpleQueue[str]()
        self._thread = threading.Thread(target=self._work, name="compiler")  # for which the interpreter's end waits

    def ask(self, wanted: Wanted, *, ahead: bool = False) -> Asked:
        """Has a program compiled, or loaded if it was kept, when its turn comes."""
        asked = Asked(wanted, ahead=ahead)
        if self._thread.ident is None:
            self._thread.start()
        self._queue.put(asked)
        return asked

    def get(self, asked: Asked) -> jax.stages.Compiled:
        """The program, once all processes have compiled it. What failed beside something else is tried once more.

        Raises:
            Interrupted: a signal came first.
            ProcessError: another process could not compile it; or what the compiler raised here.
        """
        if asked.ahead and self._failed(asked):
            asked = self.ask(asked.wanted)
        return self._together("compile", asked, asked.result.result)

    def news(self) -> list[str]:
        """Lines about what was compiled, or failed, since this was called last."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def close(self) -> None:
        """Ends the thread after what it is compiling, for which the process does not wait.

        Of several processes, each first compiles all that was asked for: another's compiler may have begun with it.
        """
        with contextlib.suppress(queue.Empty):  # the thread takes from the queue too
            while jax.process_count() == 1:
                self._queue.get_nowait()
        self._queue.put(None)
        if self._thread.ident is not None:
            self._stop.leave(self._thread)

    def _failed(self, asked: Asked) -> bool:
        """Whether some process could not compile it."""
        failed = self._together("compile ahead", asked, lambda: asked.result.exception() is not None)
        return "True" in gather(str(failed))

    def _together[T](self, how: str, asked: Asked, wait: Callable[[], T]) -> T:
        self._number += 1  # two programs may be the same in words
        what = f"{how} {asked.wanted.what} (program {self._number})"
        return self._stop.unless_asked(lambda: together(what, wait))

    def _work(self) -> None:
        while (asked := self._queue.get()) is not None:
            try:
                self._compile(asked)
            except BaseException as error:  # `get` raises it
                if asked.ahead:
                    again = "it is tried again when it is needed"
                    self._news.put(f"could not compile {asked.wanted.what} ahead: {root_cause(error)}; {again}")
                asked.result.set_exception(error)

    def _compile(self, asked: Asked) -> None:
        begin, wanted = time.perf_counter(), asked.wanted
        found = find_program(wanted.made_of, wanted.devices)
        program = wanted.build() if found is None else found
        memory = program.memory_analysis()  # None where the backend can't tell
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        self._news.put(
            f"{'compiled' if found is None else 'loaded'} {wanted.what} in {time.perf_counter() - begin:.0f} s"
            + ", before it is needed" * asked.ahead
            + (f"; each device needs {si(held)}B" if memory else "")
        )
        asked.result.set_result(program)
        if found is None:
            keep_program(wanted.made_of, wanted.devices, program)


class StagePrograms:
    """A run's steps, one per stage of its schedule and bucket: those of the stage that trains, and then the next's."""

    def __init__(
        self,
        programs: Programs,
        stages: Callable[[int], list[Stage]],
        buckets: Callable[[int, int], list[BucketConfig]],
        step: Callable[[MoCConfig, BucketConfig], Wanted],
    ) -> None:
        """Args:
        stages: those from a batch on.
        buckets: of batches [begin, end).
        """
        self._programs, self._stages_from, self._buckets, self._step = programs, stages, buckets, step
        self._asked: dict[tuple[MoCConfig, BucketConfig], Asked] = {}
        self._used: dict[tuple[MoCConfig, BucketConfig], jax.stages.Compiled] = {}
        self._stage: Stage | None = None

    def begin(self, batch: int) -> None:
        """Asks for what the stage of this batch needs."""
        self._ask(self._stages_from(batch)[0])

    def ready(self, batch: int, bucket: BucketConfig) -> bool:
        """Whether `get` returns at once."""
        stage = self._stage
        return stage is not None and batch < stage.end and (stage.moc, bucket) in self._used

    def get(self, batch: int, bucket: BucketConfig) -> jax.stages.Compiled:
        """The step for this batch; errors of `Programs.get`.

        When a stage begins, the programs of the one before are forgotten, and those of the next one asked for.
        """
        if self._stage is None or batch >= self._stage.end:
            self._stage, *later = self._stages_from(batch)
            self._ask(self._stage)  # as was done, unless the newest checkpoint turned out to be damaged
            self._asked = {key: asked for key, asked in self._asked.items() if key[0] == self._stage.moc}
            self._used = {}
            first = self._used[self._stage.moc, bucket] = self._programs.get(self._asked[self._stage.moc, bucket])
            for stage in later[:1]:
                self._ask(stage, ahead=True)
            return first
        key = self._stage.moc, bucket
        if key not in self._used:
            self._used[key] = self._programs.get(self._asked[key])
        return self._used[key]

    def news(self) -> list[str]:
        """See `Programs.news`."""
        return self._programs.news()

    def close(self) -> None:
        """See `Programs.close`."""
        self._programs.close()

    def _ask(self, stage: Stage, *, ahead: bool = False) -> None:
        for bucket in self._buckets(stage.begin, stage.end):
            if (stage.moc, bucket) not in self._asked:
                self._asked[stage.moc, bucket] = self._programs.ask(self._step(stage.moc, bucket), ahead=ahead)
