"""Traces: which steps, and where xprof finds them."""

import jax
import jax.numpy as jnp
import pytest

from moc_jax.training.profile import WARM, Profile


@pytest.mark.parametrize(("steps", "start", "end", "seen"), [(2, 10, 20, [15, 16]), (9, 0, 6, [5, 6]), (0, 0, 9, [])])
def test_steps_after_the_warm_ones_are_traced_and_no_others(tmp_path, steps, start, end, seen):
    """As many as asked for, or until the run ends."""
    paused = []

    def between(action, step):
        paused.append(step)
        action(step)

    double = jax.jit(lambda x: 2 * x)
    profile = Profile(steps, str(tmp_path), start, between)
    for step in range(start + 1, end + 1):
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            double(jnp.ones(3)).block_until_ready()
        profile.after(step)
    profile.close()
    files = list(tmp_path.rglob("*.xplane.pb"))
    assert len(paused) == 2 * bool(seen)
    assert len(files) == bool(seen)
    if seen:
        (file,) = files
        name = f"step-{start + WARM + 1:08d}"
        assert file == tmp_path / "tensorboard" / "plugins" / "profile" / name / "process-00000.xplane.pb"
        data = jax.profiler.ProfileData.from_file(str(file))  # what is in it lives as long
        names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
        assert names.count("train") == len(seen)


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace", "folder"])
def test_a_trace_that_fails_costs_no_step(tmp_path, monkeypatch, broken):
    def fail(*arguments, **options):
        raise RuntimeError("no trace")

    if broken == "folder":
        (tmp_path / "tensorboard").write_text("")
    else:
        monkeypatch.setattr(jax.profiler, broken, fail)
    profile = Profile(1, str(tmp_path), 0, lambda action, step: action(step))
    profile.after(WARM - 1)
    with pytest.warns(UserWarning, match=r"training continues without train\.profile_steps: "):
        [profile.after(step) for step in (WARM, WARM + 1)]
    profile.close()
    monkeypatch.undo()
    if broken == "stop_trace":
        jax.profiler.stop_trace()
