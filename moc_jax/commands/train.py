"""Trains a model on video files; the same command resumes where it was stopped.

    moc-train --config demo [--any.nested.field value]

Several hosts: the same command on each (with --mesh.coordinator, --mesh.num-processes and --mesh.process-id where no
cluster gives them). Folders must be on storage that all hosts share.
"""

import contextlib
from collections.abc import Sequence

from moc_jax import flags
from moc_jax.cli import clean_exit, load_config
from moc_jax.phases import Phases, garbage_left
from moc_jax.signals import Signals


def main(argv: Sequence[str], signals: Signals | None = None) -> None:
    """Exits with 0 when the run is done or was stopped by a signal, 2 for a wrong setting, 1 for what went wrong.

    A signal before there is anything to save exits with 130 (SIGINT) or 143 (SIGTERM).
    """
    phases = Phases()
    with clean_exit():
        config = load_config(argv)
    phases.done("config")

    with contextlib.nullcontext(signals) if signals else Signals(whole_process=True) as signals, clean_exit():
        with signals.deferred(line=""), garbage_left():  # an extension that is interrupted while it loads is broken
            flags.set_flags()
            # Only now: a wrong setting is reported before any device is touched.
            from moc_jax.processes import wake_devices

            wake_devices(config.mesh, signals.leave)  # while the rest is imported
            from moc_jax.attention.api import given_tilings
            from moc_jax.commands.preparing import prepared
            from moc_jax.compilation import kept_programs
            from moc_jax.data import resolved
            from moc_jax.processes import join, losses_reported
            from moc_jax.sharding import make_mesh
            from moc_jax.training.loop import train
            from moc_jax.training.start import check_first_frames, check_public, initial_codec, trained_on
            from moc_jax.training.stop import RunStop
            from moc_jax.training.workdir import claimed

            if config.train.preview_every:
                from moc_jax.sampling.preview import make_preview
            else:
                make_preview = None
        signals.check()
        phases.done("imports")
        given_tilings(config.attention)  # a file of tilings that can't be read is reported before any work
        check_public(config)  # and so are weights
        check_first_frames(config)
        join(config.mesh)
        phases.done("devices")
        with (
            claimed(config.workdir) as lock,
            losses_reported(config.mesh.heartbeat),
            kept_programs(config.compilation_cache),
        ):
            mesh, stop = make_mesh(config.mesh), RunStop(signals)
            codec = initial_codec(config)
            manifest = prepared(config, codec, known=trained_on(config))
            config = resolved(config, manifest)
            preview = make_preview(config, manifest, stop) if make_preview else None
            phases.done("data")
            train(config, manifest, mesh, preview=preview, stop=stop, lock=lock, phases=phases)
