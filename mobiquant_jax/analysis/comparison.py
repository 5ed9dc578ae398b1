"""The router against other ways to spend the same bits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from mobiquant_jax.analysis.linears import elastic_config, linear_shares
from mobiquant_jax.analysis.oracle import joint_oracle, spread_over_tokens, token_oracle
from mobiquant_jax.analysis.probe import Probe
from mobiquant_jax.analysis.rows import Case
from mobiquant_jax.analysis.static import Allocation
from mobiquant_jax.analysis.steps import Score, Steps
from mobiquant_jax.analysis.token_errors import squared_errors
from mobiquant_jax.routing import NormBudget, RandomDepth

ROUTER = "router"
RIVALS = {
    "random": "each token of each linear draws one of two adjacent depths",
    "norm": "tokens of large input norm take the deeper of two adjacent depths",
    "static": "one depth a linear for all tokens, the best found on calibration text",
    "joint norm": "tokens and linears ranked together, by squared input norm and by what each linear adds to the loss",
    "token oracle": "tokens of a linear ranked by their true output error, every linear at the average",
    "joint oracle": "tokens and linears ranked together, by true output error and by what each linear adds to the loss",
}
"""What the router is compared with, in the order of the tables."""


class Rivals:
    """Runs every rival of the router on a window, at the bits that the router used.

    Args:
        steps: the compiled passes.
        budgets: average bits for each average asked for: those that the router used.
        allocations: the static allocation for each average asked for.
    """

    def __init__(self, steps: Steps, budgets: Mapping[float, float], allocations: Mapping[float, Allocation]) -> None:
        self._steps, self._budgets, self._allocations = steps, budgets, allocations
        slice_bits = elastic_config(steps.model).slice_bits
        shares = jnp.asarray(linear_shares(steps.model.config), jnp.float32)

        @jax.jit
        def token_tables(measured: Probe, bits: Array, increases: Array) -> dict[str, Array]:
            errors = squared_errors(measured)
            low = jnp.arange(errors.shape[-1]) < errors.shape[-1] - 1  # at full depth nothing is lost
            norms = jnp.square(measured.norm)[..., None] * low

            def joint(squared: Array) -> Array:
                return joint_oracle(spread_over_tokens(increases, squared), shares, bits, slice_bits)

            tables = {"joint norm": joint(norms), "joint oracle": joint(errors)}
            return tables | {"token oracle": token_oracle(errors, bits, slice_bits)}

        self._token_tables = token_tables

    def __call__(self, tokens: Int[Array, "B T"], measured: Probe, key: Key[Array, ""]) -> dict[Case, Score]:
        """The scores, on the device.

        Args:
            tokens: the window.
            measured: its probe.
            key: of the random policy.
        """
        variables, scores = self._steps.model.variables, {}
        for number, (asked, budget) in enumerate(self._budgets.items()):
            request = jnp.full(tokens.shape[0], budget, jnp.float32)
            for name, policy in (("random", RandomDepth(bits=request)), ("norm", NormBudget(bits=request))):
                draw = jax.random.fold_in(key, number)
                scores[Case(name, asked)], _ = self._steps.routed(variables, tokens, policy, draw)
            allocation = self._allocations[asked]
            tables = {"static": jnp.asarray(allocation.table)}
            tables |= self._token_tables(measured, jnp.float32(budget), jnp.asarray(allocation.increases, np.float32))
            for name in (name for name in RIVALS if name in tables):  # jit returns a dict by the alphabet
                scores[Case(name, asked)] = self._steps.tabled(variables, tokens, tables[name])
        return scores
