"""What is measured, and how often."""

from dataclasses import dataclass

from mobiquant_jax.evaluation import check_bits
from mobiquant_jax.models import LlamaConfig

DENSE_BITS = 16.0  # of the bfloat16 model that speeds are compared with
DEPTHS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Sizes and counts of the measurements.

    Attributes:
        context: tokens in the cache when decoding is timed.
        steps: decoding steps in one timed program.
        batches: sequences decoded together.
        bits: average bits of the packed model's decoding.
        prefill: tokens of a prefill's products.
        loops: passes over the layers in one timed program of products.
        repeats: timed runs, of which the median counts.
    """

    context: int = 1024
    steps: int = 128
    batches: tuple[int, ...] = (1, 4, 16)
    bits: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0, 8.0)
    prefill: tuple[int, ...] = (512, 2048)
    loops: int = 100
    repeats: int = 5

    def __post_init__(self) -> None:
        """Checks the counts."""
        for name in ("context", "steps", "loops", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("batches", "prefill"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be numbers from 1, got {getattr(self, name)}")
        for bits in self.bits:
            check_bits(bits)

    def check_model(self, config: LlamaConfig) -> None:
        """Raises ValueError unless the timed tokens fit the model's context."""
        tokens = self.context + self.steps
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"context {self.context} and {self.steps} steps exceed the model's {config.max_position_embeddings} "
                "positions"
            )
