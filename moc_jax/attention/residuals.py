"""Names of what attention's backward pass needs of its forward pass, for the policies of `jax.checkpoint`.

    jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*RESIDUALS))

With all of them kept, neither attention nor its routing is computed a second time: of N tokens in H heads of D, the
output (N H D numbers), the log-sum-exp (N H in float32) and the routes (N H K in int32).
"""

from jax.ad_checkpoint import checkpoint_name

from moc_jax.shapes import Array, Float, Float32, Int

OUTPUT, LOG_SUM_EXP, ROUTES = RESIDUALS = "moc_output", "moc_log_sum_exp", "moc_routes"


def named_outputs(out: Float[Array, "*D"], lse: Float32[Array, "*N"]) -> tuple[Array, Array]:
    """Both by their names. What is named is to be used from there on, or the unnamed is computed again."""
    return checkpoint_name(out, OUTPUT), checkpoint_name(lse, LOG_SUM_EXP)


def named_routes(routes: Int[Array, "B H Q K"]) -> Int[Array, "B H Q K"]:
    """Routes by their name."""
    return checkpoint_name(routes, ROUTES)
