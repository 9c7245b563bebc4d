"""Several processes as one run: how they join, take turns, and tell one another what each alone can know.

Collectives over the devices give up when a process comes half a minute late (Gloo's timeout). What takes longer, or may
fail on one process alone, is waited for through the key-value store of jax's coordination service instead.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np
from jax._src import clusters, distributed  # the private parts of jax here; tests/test_processes.py names what is gone
from jax.experimental import multihost_utils

from moc_jax.config import ConfigError, MeshConfig
from moc_jax.errors import Failure, root_cause

_PATIENCE = 1000  # ms per request: between two, a signal is heard
_VERDICT = 10  # s after the heartbeat, at most, until the watchers say who is lost
_JOINING = 60_000  # ms for what process 0 does at once
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how XLA's errors begin
_CLUSTERS = {
    "OmpiCluster": "Open MPI",
    "SlurmCluster": "SLURM",
    "GkeTpuCluster": "a slice of TPUs (its environment)",
    "GceTpuCluster": "a slice of TPUs (its metadata)",
    "K8sCluster": "a Kubernetes job",
}


class ProcessError(Failure):
    """Another process failed: says which one, at what, and why."""


# ------------------------------------------------------------------------------------------------ joining


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What started this process, alone or with others."""

    name: str
    """As users know it."""
    processes: int
    process: int
    alone: bool
    """The only process on its host: all of the host's devices are for it. (Else jax gives each process one GPU.)"""


def recognised() -> Cluster | None:
    """The cluster that this process is part of; None on a machine of its own.

    Raises:
        ConfigError: there is one, but it doesn't tell which of its processes this is.
    """
    kind = next((kind for kind in clusters.ClusterEnv._cluster_types if _present(kind)), None)
    if kind is None:
        return None
    name = _CLUSTERS.get(kind.__name__, kind.__name__)
    try:
        return Cluster(name, kind.get_process_count(), kind.get_process_id(), _alone())
    except Exception as error:
        raise ConfigError(
            f"{name} started this process, but does not say which of how many it is: {error}. Give --mesh.coordinator "
            "host:port, --mesh.num-processes and --mesh.process-id; or --mesh.distributed False if it is the only one"
        ) from error


def _present(kind: type[clusters.ClusterEnv]) -> bool:
    if kind.opt_in_only_method:
        return False
    if kind is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ:
        return False  # any pod of Kubernetes: only those of indexed jobs have a number
    try:
        return kind.is_env_present()
    except Exception:  # no answer from where it would be asked
        return False


def _alone() -> bool:
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return re.fullmatch(r"1(\(x\d+\))?", per_node) is not None or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def join(cfg: MeshConfig) -> None:
    """Makes this process one of the run's, and starts its devices; what `cfg` leaves open the cluster tells.

    From then on a watcher (moc_jax/watcher.py) reports a process that is lost, and ends this one.

    Raises:
        ConfigError: neither of them tells all that is needed, the others did not come, or this machine has no such
            devices.
    """
    joins, cluster = _to_join(cfg)
    if joins:
        _join_cluster(cfg, cluster)
    try:
        jax.devices()
    except RuntimeError as error:
        asked = jax.config.jax_platforms
        if not asked:
            raise
        raise ConfigError(
            f"JAX_PLATFORMS is {asked!r}, which can't be used here: {error}. Set it to what this machine has (cpu, "
            "cuda, tpu), or unset it"
        ) from error
    if jax.process_count() > 1 and distributed.global_state.client is None:
        raise ConfigError(
            f"these devices belong to {jax.process_count()} processes, which only work together: start the same "
            "command on each host, with mesh.distributed True"
        )


def wake_devices(cfg: MeshConfig, leave: Callable[[threading.Thread], None]) -> None:
    """Starts this machine's devices in a thread, so that `join` waits less; not if it has to join a cluster before.

    `leave` is given the thread, for which a process that ends early need not wait.
    """

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # which `join` meets again, and reports
            jax.devices()

    if not _to_join(cfg)[0]:
        thread = threading.Thread(target=wake, name="devices", daemon=True)
        thread.start()
        leave(thread)


def _to_join(cfg: MeshConfig) -> tuple[bool, Cluster | None]:
    """Whether there are other processes to join, and the cluster that knows them."""
    told = bool(cfg.coordinator and cfg.num_processes and cfg.process_id != -1)
    cluster = recognised() if cfg.distributed and not told else None
    return cfg.located or (cluster is not None and cluster.processes > 1), cluster


def _join_cluster(cfg: MeshConfig, cluster: Cluster | None) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # until training, SIGTERM ends a process as usual
    if cluster and cluster.process == 0:
        line = f"{cluster.processes} processes, started by {cluster.name}, join in one run"
        print(f"{line}; with --mesh.distributed False each runs alone", flush=True)
    own = list(cfg.local_device_ids)
    try:
        with _limited(cfg.initialization_timeout):
            jax.distributed.initialize(
                cfg.coordinator or None,
                cfg.num_processes or None,
                None if cfg.process_id == -1 else cfg.process_id,
                own if own or (cluster and cluster.alone) else None,  # none by name are all
                initialization_timeout=cfg.initialization_timeout + _VERDICT,
                heartbeat_timeout_seconds=cfg.heartbeat,
            )
    except ValueError as error:
        raise ConfigError(
            f"mesh.distributed: {error} Nothing in its environment says so; give --mesh.coordinator host:port, "
            "--mesh.num-processes and --mesh.process-id"
        ) from error
    state = distributed.global_state  # jax's public functions start the devices, which needs all other processes
    if state.client is not None and state.num_processes > 1:
        _watch(state.process_id, str(state.coordinator_address), cfg.heartbeat)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the process when joining takes longer; jax would abort it, with a trace of C++ functions."""

    def give_up() -> None:
        state = distributed.global_state
        print(
            f"error: process {state.process_id} waited {seconds:g} s at {state.coordinator_address}, but not all "
            f"{state.num_processes} processes came. Do all run, and can they reach that address? "
            "--mesh.initialization-timeout waits longer",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watch(process: int, coordinator: str, heartbeat: float) -> None:
    """Starts this process's watcher, and tells the others where that of process 0 is."""
    if process == 0:
        token, address = secrets.token_hex(16), None
    else:
        token, port = json.loads(_store().blocking_key_value_get("moc_jax/watcher", _JOINING))
        address = coordinator.rpartition(":")[0].strip("[]"), port
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(pathlib.Path(__file__).with_name("watcher.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # what a terminal or a scheduler sends to the run is not for the watcher
    )
    says, hears = watcher.stdin, watcher.stdout
    assert says is not None
    assert hears is not None

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            says.write(text.encode() + b"\n")
            says.flush()

    def listen() -> None:
        if hears.readline():
            os._exit(1)  # whatever the main thread waits for will not come

    settings = {"process": process, "parent": os.getpid(), "heartbeat": heartbeat, "token": token, "address": address}
    say(json.dumps(settings))
    port = int(hears.readline() or 0)
    if process == 0:
        _store().key_value_set("moc_jax/watcher", json.dumps((token, port)))
    threading.Thread(target=listen, name="watcher", daemon=True).start()
    atexit.register(say, "goodbye")


# ------------------------------------------------------------------------------------------------ together


@contextlib.contextmanager
def losses_reported(heartbeat: float) -> Iterator[None]:
    """Where a collective fails because another process is lost, it is the watcher that says so and ends this process.

    An error of XLA with several processes is therefore held back for as long as that may take.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # ValueError: it failed while it was dispatched
        of_xla = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
        if of_xla and jax.process_count() > 1:
            seconds = heartbeat + _VERDICT
            line = f"\n{root_cause(error)}\nwaiting up to {seconds} s for a report of a lost process"
            print(line, file=sys.stderr, flush=True)
            time.sleep(seconds)
        raise


class StopPoint:
    """From here on jax takes SIGTERM, and all processes agree on one of their calls of `reached` to stop at.

    jax's own manager would count Orbax's questions too, which are numbered by steps.
    """

    def __init__(self) -> None:
        self._manager = distributed._jax.create_preemption_sync_manager()  # jax has a public one for itself alone
        self._manager.initialize(_store())
        self._calls = 0

    def reached(self) -> bool:
        """Whether all stop here; all processes call this equally often."""
        self._calls += 1
        return self._manager.reached_sync_point(self._calls)

    def close(self) -> None:
        """To be called before the processes part."""
        self._manager.shutdown()


def main_process_first[T](what: str, action: Callable[[], T]) -> T:
    """`action()` on process 0, then on all others; each returns its own result, once all have succeeded.

    Args:
        what: completes "process 0 could not ..."; used once in a run. All processes call this together.

    Raises:
        ProcessError: another process failed. Whatever this process's own `action` raises is raised as it is.
    """
    if jax.process_count() > 1 and jax.process_index() != 0:
        _expect(what, 0)
    return together(what, action)


def together[T](what: str, action: Callable[[], T]) -> T:
    """`action()` on all processes, of which some may take much longer; each returns once all have succeeded.

    `what`, errors: as of `main_process_first`.
    """
    if jax.process_count() == 1:
        return action()
    mine, others = jax.process_index(), set(range(jax.process_count())) - {jax.process_index()}
    outcome = "interrupted"
    try:
        result = action()
        outcome = ""
    except Exception as error:
        outcome = f"{error}" or type(error).__name__
        raise
    finally:
        _store().key_value_set(_key(what, mine), outcome)
    for other in sorted(others):
        _expect(what, other)
    return result


def _expect(what: str, process: int) -> None:
    """Waits, for hours if need be, until `process` tells how its turn went."""
    while True:
        try:
            outcome = _store().blocking_key_value_get(_key(what, process), _PATIENCE)
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ProcessError(f"process {process} is gone; it was supposed to {what}: {error}") from error
    if outcome:
        raise ProcessError(f"process {process} could not {what}: {outcome}")


class _Store(Protocol):
    """The key-value store of jax's coordination service, which has no public name."""

    def key_value_set(self, key: str, value: str) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


def _store() -> _Store:
    client: _Store | None = distributed.global_state.client
    assert client is not None  # a run of several processes has joined
    return client


def _key(what: str, process: int) -> str:
    return f"moc_jax/{what}/{process}"


def attempt[T](action: Callable[[], T], fatal: tuple[type[Exception], ...] = ()) -> tuple[T | None, str]:
    """(result, "") when `action` succeeded on every process, else (None, why); `fatal` errors are raised."""
    try:
        result, problem = action(), ""
    except fatal:
        raise
    except Exception as error:
        result, problem = None, root_cause(error)
    if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(result is not None)).all():
        return None, problem or "another process could not read it"
    return result, problem


def gather(text: str) -> list[str]:
    """Every process's text, in order of process; all call this together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes, so that few programs are compiled
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def sync(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"moc_jax:{name}")
