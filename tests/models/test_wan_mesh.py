"""WanDiT on a mesh: what several devices compute is what one does, with heads of queries and keys normed together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from moc_jax.models import abstract
from moc_jax.sharding import AXES, batch_sharding, logical_axes, tree_shardings
from tests.models.test_wan import CFG, MOC, inputs, lengths_of, model_of

_SLOW = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes", [(1, 1, 2, 2), *(pytest.param(x, marks=_SLOW) for x in ((1, 2, 1, 2), (2, 1, 2, 1)))], ids=str
)
def test_devices_compute_together_what_one_does(sizes):
    cfg = dataclasses.replace(CFG, remat="full", depth=1)
    graph, state = model_of(cfg)
    weights = nnx.to_pure_dict(state)
    batch = (*inputs(), lengths_of())

    def loss(weights, video, text, t, lengths):
        out = nnx.merge(graph, weights)(video, text, t, lengths, MOC)
        return jnp.mean(out[:, :7] ** 2), out

    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, one), of_one = jax.jit(gradient)(weights, *batch)

    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    axes = logical_axes(abstract(cfg)[1])
    places = tree_shardings(weights, axes, mesh)
    with jax.set_mesh(mesh):
        program = jax.jit(gradient, in_shardings=(places, *[batch_sharding(mesh)] * 4), out_shardings=(None, places))
        (_, several), of_several = program(
            jax.device_put(weights, places), *jax.device_put(batch, batch_sharding(mesh))
        )
    heads = of_several["network"]["blocks"]["attention"]["q_norm"]["scale"].sharding.spec
    assert heads[1] == ("tensor" if sizes[3] > 1 else None)
    for b, used in enumerate((9, 7)):
        np.testing.assert_allclose(several[b, :used], one[b, :used], rtol=1e-4, atol=1e-4)
    for (path, a), b in zip(jax.tree.leaves_with_path(of_several), jax.tree.leaves(of_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(np.abs(b).max()), err_msg=str(path))
