"""The paper's experiment: keep a tenth of the tokens at full depth and read all others at a low one.

If the tokens that lose most were the same at every width, it would not matter at which width they are chosen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from mobiquant_jax.analysis.linears import elastic_config
from mobiquant_jax.analysis.probe import Probe
from mobiquant_jax.analysis.rows import Case
from mobiquant_jax.analysis.steps import Score, Steps
from mobiquant_jax.analysis.token_errors import squared_errors, worst_tokens
from mobiquant_jax.quant import widths

NONE, RANDOM = "none", "random"
MOST_RUNS = 2  # low depths that are run: at deeper ones little is left to gain


def run_depths(slices: int) -> range:
    """The low depths of the experiment."""
    return range(1, min(MOST_RUNS, slices - 1) + 1)


def retained_sets(
    probe: Probe, depth: int, slice_bits: tuple[int, ...], key: Key[Array, ""]
) -> dict[str, Bool[Array, "L N B T"]]:
    """The tokens that each linear keeps at full depth, for each way to choose them.

    Args:
        probe: of the window.
        depth: at which the other tokens are read.
        slice_bits: bits of each slice.
        key: of the random choice.

    Returns:
        ``none``, ``random``, the worst by absolute error at each width, and by relative error at the width run.
    """
    bits = widths(slice_bits)
    by_depth = squared_errors(probe)
    sets = {NONE: jnp.zeros(probe.norm.shape, bool), RANDOM: worst_tokens(jax.random.uniform(key, probe.norm.shape))}
    sets |= {f"worst at {bits[k]} bits": worst_tokens(by_depth[..., k]) for k in range(len(bits) - 1)}
    sets[f"relatively worst at {bits[depth - 1]} bits"] = worst_tokens(probe.errors[..., depth - 1])
    return sets


def retention_scores(
    steps: Steps, tokens: Int[Array, "B T"], measured: Probe, key: Key[Array, ""]
) -> dict[Case, Score]:
    """Runs a window at every low depth with every set of retained tokens; the scores stay on the device.

    Args:
        steps: the compiled passes.
        tokens: the window.
        measured: its probe.
        key: of the random choice.
    """
    slice_bits, scores = elastic_config(steps.model).slice_bits, {}
    for depth in run_depths(len(slice_bits)):
        for name, kept in retained_sets(measured, depth, slice_bits, key).items():
            table = jnp.where(kept, len(slice_bits), depth).astype(jnp.int32)
            case = Case(name, float(widths(slice_bits)[depth - 1]))
            scores[case] = steps.tabled(steps.model.variables, tokens, table)
    return scores
