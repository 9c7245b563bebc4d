"""What a save takes: counted, and as a checkpoint is."""

import jax
import pytest

from moc_jax.planning.saving import Save, checkpoint_bytes, save_of, table
from moc_jax.training.state import create_state
from tests.training.small import CONFIG, blueprint_of, changed, mesh_of


@pytest.mark.parametrize("decay", [0.999, 0.0])
def test_bytes_are_those_of_the_state(decay):
    config = changed(CONFIG, train={"ema_decay": decay})
    mesh = mesh_of(1)
    with jax.set_mesh(mesh):
        state = create_state(blueprint_of(config, mesh))
    assert checkpoint_bytes(config) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_copies_do_not_write():
    assert save_of(CONFIG, hosts=16, copies=4).writers == 4
    save = Save(bytes=48_000, writers=4)
    assert (save.per_host, save.rate(30)) == (12_000, 400)
    assert save.least_writers(400, 30) == 4
    assert save.least_writers(399, 30) == 5


def test_the_table_shows_both():
    lines = table(CONFIG)
    assert lines[0].endswith("GB.")
    assert any(line.startswith("| 256 |") for line in lines)
