"""Names of what attention's backward pass needs of its forward pass, for the policies of `jax.checkpoint`.

    jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*RESIDUALS))

With all of them kept, neither attention nor its routing nor the sorting of pairs is done a second time: of N tokens in
H heads of D, the output (N H D numbers), the log-sum-exp (N H in float32) and the routes with where their pairs lie
(about 2 N H K in int32). With INPUTS kept too, queries, keys and values (3 N H D), the devices of a scene do not
exchange heads of these again. They are made again, for the gradients of the norms before them, and groups of tokens
gather each other's keys again.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

from moc_jax.shapes import Array, Float, Float32

OUTPUT, LOG_SUM_EXP, ROUTES = RESIDUALS = "moc_output", "moc_log_sum_exp", "moc_routes"
INPUTS = "moc_inputs"


def named_outputs(out: Float[Array, "*D"], lse: Float32[Array, "*N"]) -> tuple[Array, Array]:
    """Both by their names. What is named is to be used from there on, or the unnamed is computed again."""
    return checkpoint_name(out, OUTPUT), checkpoint_name(lse, LOG_SUM_EXP)


def named_routes[T](routes: T) -> T:
    """Routes, or what was worked out from them, by their name; a tree of arrays. Policies keep what is used later."""
    return jax.tree.map(lambda x: checkpoint_name(x, ROUTES), routes)
