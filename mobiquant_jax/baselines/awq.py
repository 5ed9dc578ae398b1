"""AWQ (Lin et al., arXiv 2306.00978): channels that carry large activations are scaled up before rounding.

    y = (x / s) (s W)       s = m^a / sqrt(max(m^a) min(m^a))       m = mean |x|,  a searched in [0, 1)

1 / s moves into what feeds the linear: the norm before q/k/v and gate/up, the columns of up before down, those of v
before o where each query head has its own value head. Then each group's range is clipped, q and k excepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.baselines.awq_search import fold, search_scales
from mobiquant_jax.baselines.capture import INPUT_GROUPS, TokenWeighting, capture
from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.settings import check_number, static
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec
from mobiquant_jax.quant import unclipped_limits
from mobiquant_jax.quant.grid import group

UNCLIPPED = ("attention/q_proj", "attention/k_proj")  # their errors multiply in the scores


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """Settings of AWQ.

    Attributes:
        most_clipping: largest share of the range that may be cut.
        energy_exponent: see `TokenWeighting`.
        first_token: how often the token at position 0 counts.
        scale_steps: exponents tried, from 0 in steps of ``1 / scale_steps``.
        clip_steps: ranges tried, from the whole one down; 0 leaves out clipping.
        search_windows: windows, evenly spaced, on which the attention's and the MLP's outputs are compared.
    """

    most_clipping: float = 0.5
    energy_exponent: float = 0.0
    first_token: float = 1.0
    scale_steps: int = static(20)
    clip_steps: int = static(10)
    search_windows: int = static(16)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_number("awq.most_clipping", self.most_clipping, least=0, most=1)
        check_number("awq.energy_exponent", self.energy_exponent, least=0)
        check_number("awq.first_token", self.first_token, least=0)
        check_number("awq.scale_steps", self.scale_steps, least=1)
        check_number("awq.clip_steps", self.clip_steps, least=0)
        check_number("awq.search_windows", self.search_windows, least=1)

    @property
    def weighting(self) -> TokenWeighting:
        """How tokens count in the statistics of inputs: scales and clipping, not the outputs they are judged by."""
        return TokenWeighting(exponent=self.energy_exponent, first=self.first_token)

    @classmethod
    def recipe(cls, bits: int) -> "AWQConfig":
        """The published settings at a width."""
        return cls()


def clipped_limits(
    weight: Float[Array, "in out"], gram: Float[Array, "in in"], spec: QuantSpec, config: AWQConfig
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """Group limits ``[max(min W, -m), min(max W, m)]``, m a share of max |W| that loses least.

    The loss is the squared error of the group's share of the output, ``d^T H_g d`` with d the weight error.
    """
    lo, hi = unclipped_limits(weight, spec.group_size)
    if config.clip_steps == 0:
        return lo, hi
    largest = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    groups = len(weight) // spec.group_size
    own = jnp.einsum("gigj->gij", gram.reshape(groups, spec.group_size, groups, spec.group_size))

    def limits(share: Array) -> tuple[Array, Array]:
        return jnp.maximum(lo, -share * largest), jnp.minimum(hi, share * largest)

    def error(share: Array) -> Float[Array, "groups out"]:
        difference = group(fake_quantize(weight, *limits(share), spec.bits) - weight, spec.group_size)
        return jnp.einsum("gio,gij,gjo->go", difference, own, difference)

    shares = 1 - config.most_clipping * jnp.arange(config.clip_steps) / config.clip_steps
    best = jnp.argmin(jax.lax.map(error, shares), axis=0)
    return limits(shares[best])


def build(spec: QuantSpec) -> Callable[[BlockTask], BlockOutcome]:
    """AWQ for the blocks of a model."""

    def quantize_block(settings: AWQConfig, block: Params, stream: Float[Array, "N T D"]) -> Params:
        found = capture(spec.config, block, stream, tuple(paths[0] for paths in INPUT_GROUPS), settings.weighting)
        exponents = jnp.arange(settings.scale_steps) / settings.scale_steps
        stride = max(1, len(stream) // settings.search_windows)
        scales = search_scales(spec, exponents, block, stream[::stride][: settings.search_windows], found)
        folded = fold(block, scales, spec.config)
        kernels = get_kernels(folded, spec.config)
        for paths in INPUT_GROUPS:
            gram, scale = found[paths[0]].gram, scales.of(paths[0])
            if scale is not None:
                gram = gram / (scale[:, None] * scale)  # of x / s
            for path in paths:
                if path in UNCLIPPED:
                    kernels[path] = round_to_nearest(kernels[path], spec.group_size, spec.bits)
                else:
                    limits = clipped_limits(kernels[path], gram, spec, settings)
                    kernels[path] = fake_quantize(kernels[path], *limits, spec.bits)
        return with_kernels(folded, kernels)

    def precise(settings: AWQConfig, block: Params, stream: Float[Array, "N T D"]) -> Params:
        with jax.default_matmul_precision("highest"):
            return quantize_block(settings, block, stream)

    runs = jax.jit(jax.vmap(precise, in_axes=(0, None, 0)))
    return lambda task: BlockOutcome(params=runs(task.settings, task.dense, task.quantized))
