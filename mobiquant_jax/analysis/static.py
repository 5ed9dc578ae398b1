"""The best static depth of every linear at an average of bits: what a router that ignores tokens could reach.

The loss of an allocation is taken to be the sum of what each linear alone adds,

    loss(k_1, ..., k_n) ~ sum_l increase_l(k_l)         sum_l size_l bits(k_l) <= B sum_l size_l

which a knapsack minimizes exactly. What a linear adds depends on the depths of all others, so it is measured around two
bases; the allocations of each and of both together are tried on other text, and so is what no sum of single linears can
find: a uniform depth, and two depths of which all layers read the deeper one in the same linears (all of their down
projections, say). The best one is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mobiquant_jax.analysis.divergence import divergence_step
from mobiquant_jax.analysis.knapsack import knapsack
from mobiquant_jax.analysis.linears import elastic_config, linear_shares, linear_sizes
from mobiquant_jax.analysis.sensitivity import Increases
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.quant import widths


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A static allocation.

    Attributes:
        table: depth of each linear.
        increases: what linears add to the loss, as far as it was found with that.
        divergence: its loss where it was chosen, in nats a token; not a number before that.
    """

    table: Int[np.ndarray, "L N"]
    increases: Increases
    divergence: float = float("nan")


def base_depths(slices: int) -> list[int]:
    """The uniform depths around which increases are measured: all slices, and two, between what low budgets mix.

    Around one slice a model may be broken beyond what one linear can mend: an allocation of SmolLM2-135M at 2.5 bits
    found there had a perplexity of 597, one found around two slices 95.
    """
    return [slices, max(1, min(2, slices - 1))]


def allocate(
    model: ElasticModel,
    measured: Sequence[Increases],
    windows: Int[np.ndarray, "n T"],
    budgets: Sequence[float],
) -> list[Allocation]:
    """The best allocation within each budget.

    Args:
        model: an elastic model.
        measured: increases around several bases.
        windows: calibration tokens on which allocations are chosen; no part of those that were measured.
        budgets: average bits.
    """
    tried = [list(candidates(model, measured, bits)) for bits in budgets]
    tables = jnp.asarray(np.stack([candidate.table for some in tried for candidate in some]))
    step = divergence_step(model)
    losses = np.mean([step(model.variables, jnp.asarray(window)[None], tables) for window in windows], axis=0)
    remaining = iter(losses.tolist())
    scored = [[replace(candidate, divergence=next(remaining)) for candidate in some] for some in tried]
    return [min(some, key=lambda candidate: candidate.divergence) for some in scored]


def candidates(model: ElasticModel, measured: Sequence[Increases], bits: float) -> Iterator[Allocation]:
    """Allocations within a budget: of each sum of what was measured, by kind of linear, and the deepest uniform one.

    The last ones win where the sum's neglect of what linears do together costs more than it finds.
    """
    bits_at = widths(elastic_config(model).slice_bits)
    sizes = np.tile(linear_sizes(model.config), model.config.num_hidden_layers)
    for some in chain.from_iterable(combinations(measured, n + 1) for n in range(len(measured))):
        total = np.sum(some, axis=0)  # [L, N, E]
        table = knapsack(total.reshape(len(sizes), -1), sizes, bits_at, bits).reshape(total.shape[:-1])
        yield Allocation(table=table, increases=total)
    shape = measured[0].shape[:-1]
    for depths in depths_by_kind(linear_shares(model.config), bits_at, bits):
        yield Allocation(table=np.broadcast_to(depths, shape), increases=measured[0])
    depth = np.searchsorted(bits_at, bits, side="right")
    yield Allocation(table=np.full(shape, depth), increases=measured[0])


def depths_by_kind(
    shares: Float[np.ndarray, " N"], bits_at: tuple[int, ...], bits: float
) -> Iterator[Int[np.ndarray, " N"]]:
    """A depth for each kind of linear, the same in all layers: one of two, the deeper for as many as the budget allows.

    Args:
        shares: of each kind in the parameters.
        bits_at: bits at each depth, rising.
        bits: the budget. Of the depths, which differ by one or two, one lies within it and one beyond.
    """
    subsets = np.array(list(product((0, 1), repeat=len(shares))))  # [2^N, N]
    for low, high in combinations(range(len(bits_at)), 2):
        if high - low > 2 or not bits_at[low] <= bits < bits_at[high]:
            continue
        left = (bits + 1e-6 - bits_at[low]) / (bits_at[high] - bits_at[low]) - subsets @ shares
        full = left < np.where(subsets, np.inf, shares).min(axis=1)  # no other kind fits
        for deeper in subsets[(left >= 0) & full & subsets.any(axis=1)]:
            yield np.where(deeper, high + 1, low + 1)
