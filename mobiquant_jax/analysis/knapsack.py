"""The least total cost within a budget of bits, one depth an item: exact, by dynamic programming."""

import math

import numpy as np
from jaxtyping import Float, Int


def knapsack(
    costs: Float[np.ndarray, "n E"], sizes: Int[np.ndarray, " n"], bits: tuple[int, ...], average: float
) -> Int[np.ndarray, " n"]:
    """Chooses a depth for each item.

        min sum_i costs_i(k_i)   s.t.   sum_i sizes_i bits(k_i) <= average sum_i sizes_i

    With ``best_i(c)`` the least cost of the first i items within a capacity of c units above the first depth,

        best_i(c) = min_k costs_i(k) + best_{i-1}(c - units_i (bits(k) - bits(1)))

    Args:
        costs: of each item at each depth.
        sizes: of each item, in parameters; their greatest common divisor is the unit.
        bits: bits at each depth, rising.
        average: the budget.

    Returns:
        Depth 1..E of each item.

    Raises:
        ValueError: the budget is below the first depth's bits.
    """
    units = sizes // math.gcd(*sizes.tolist())
    steps = units[:, None] * (np.asarray(bits) - bits[0])  # [n, E]
    capacity = int(np.floor((average - bits[0]) * units.sum() + 1e-6))
    if capacity < 0:
        raise ValueError(f"an average of {average:g} bits is below the {bits[0]} bits of the first slice")
    best = np.zeros(capacity + 1)
    choices = []
    for cost, step in zip(costs, steps, strict=True):
        options = np.full((len(bits), capacity + 1), np.inf)
        for depth, used in enumerate(step):
            if used <= capacity:
                options[depth, used:] = cost[depth] + best[: capacity + 1 - used]
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    depths, left = np.zeros(len(costs), int), capacity
    for item in reversed(range(len(costs))):
        depths[item] = choices[item][left]
        left -= steps[item, depths[item]]
    return depths + 1
