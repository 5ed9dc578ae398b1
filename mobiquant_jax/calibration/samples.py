"""Which windows are streamed at which budgets, and in which order they train."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.quant import widths


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples are windows at a budget, ordered by budget.

    Attributes:
        window: the window of each sample, ``[S]``.
        budgets: average bits of each level.
        per_budget: samples of each level.
    """

    window: Int[np.ndarray, " S"]
    budgets: tuple[float, ...]
    per_budget: int

    @classmethod
    def create(cls, config: CalibrationConfig) -> "Samples":
        """Every level gets equally many windows, strided over the text; a window is seen at neighbouring budgets."""
        levels = len(config.budgets)
        windows = np.arange(config.windows)
        per_level = [windows[(windows - level) % levels < config.budgets_per_window] for level in range(levels)]
        return cls(window=np.concatenate(per_level), budgets=config.budgets, per_budget=config.samples_per_budget)

    def steps(
        self, batch_size: int, rng: np.random.Generator | None = None
    ) -> tuple[Int[np.ndarray, "steps batch"], Float[np.ndarray, " steps"]]:
        """One pass over all samples.

        Args:
            batch_size: samples a step, all of one budget; divides ``per_budget``.
            rng: shuffles samples within a budget and the order of steps; in order if None.

        Returns:
            ``(sample ids, budget)`` of each step.
        """
        ids = np.arange(len(self.window)).reshape(len(self.budgets), self.per_budget)
        if rng is not None:
            ids = rng.permuted(ids, axis=1)
        batches = ids.reshape(-1, batch_size)
        bits = np.repeat(np.asarray(self.budgets, np.float32), self.per_budget // batch_size)
        order = np.arange(len(batches)) if rng is None else rng.permutation(len(batches))
        return batches[order].astype(np.int32), bits[order]


def spread_budgets(budgets: tuple[float, ...], steps: int, rng: np.random.Generator) -> Float[np.ndarray, " steps"]:
    """A budget for each step: every one comes once, in random order, before any comes again.

    The last steps of training then hold them all, and no width is the one that the others spoil.
    """
    rounds = -(-steps // len(budgets))
    return np.concatenate([rng.permutation(np.asarray(budgets, np.float32)) for _ in range(rounds)])[:steps]


def drawn_widths(budgets: tuple[float, ...], slice_bits: tuple[int, ...]) -> tuple[int, ...]:
    """The widths that `draw_widths` may give for these budgets."""
    reads = widths(slice_bits)
    below = {max(width for width in reads if width <= bits) for bits in budgets}
    above = {min(width for width in reads if width >= bits) for bits in budgets}
    return tuple(sorted(below | above))


def draw_widths(
    bits: Float[np.ndarray, " steps"], slice_bits: tuple[int, ...], rng: np.random.Generator
) -> Int[np.ndarray, " steps"]:
    """Widths at slice boundaries whose expectation is the budget: one of the two that enclose it."""
    reads = np.asarray(widths(slice_bits))
    deeper = np.clip(np.searchsorted(reads, bits, side="right"), 1, len(reads) - 1)
    share = (bits - reads[deeper - 1]) / (reads[deeper] - reads[deeper - 1])
    return np.where(rng.random(len(bits)) < share, reads[deeper], reads[deeper - 1]).astype(np.int32)
