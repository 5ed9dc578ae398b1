"""GPTQ (Frantar et al., arXiv 2210.17323): rounding a row at a time, later rows make good the error of earlier ones.

With inputs X, Gram matrix H = X^T X and U the upper Cholesky factor of its inverse, H^-1 = U^T U, for i = 1, 2, ...

    q_i = grid(w_i)      e_i = (w_i - q_i) / U_ii      w_j -= U_ij e_i   for all j > i

Rows are the inputs of a kernel ``[in, out]``; all outputs are solved together. A block of rows is one group: inside it
the update is applied row by row, beyond it once a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.baselines.capture import INPUT_GROUPS, TokenWeighting, capture
from mobiquant_jax.baselines.grid import round_to_grid, scale_and_zero, shrunk_limits
from mobiquant_jax.baselines.kernels import Params, get_kernels, with_kernels
from mobiquant_jax.baselines.settings import check_number, static
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask, QuantSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """Settings of GPTQ.

    Attributes:
        damping: added to the diagonal of H, as a share of its mean.
        energy_exponent: see `TokenWeighting`.
        first_token: how often the token at position 0 counts.
        act_order: treats rows by falling diagonal of H instead of in order; the grids then come from the untouched
            weights, so that a row keeps its own group's.
        shrink_steps: candidates in the search for a smaller range of each group; 0 keeps minimum and maximum.
    """

    damping: float = 0.01
    energy_exponent: float = 0.0
    first_token: float = 1.0
    act_order: bool = static(False)
    shrink_steps: int = static(0)

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_number("gptq.damping", self.damping, least=1e-6)
        check_number("gptq.energy_exponent", self.energy_exponent, least=0)
        check_number("gptq.first_token", self.first_token, least=0)
        check_number("gptq.shrink_steps", self.shrink_steps, least=0)

    @property
    def weighting(self) -> TokenWeighting:
        """How tokens count in H."""
        return TokenWeighting(exponent=self.energy_exponent, first=self.first_token)

    @classmethod
    def recipe(cls, bits: int) -> "GPTQConfig":
        """The settings at a width."""
        return cls()


def inverse_factor(gram: Float[Array, "in in"], damping: float) -> Float[Array, "in in"]:
    """The upper factor U of ``(H + damping mean(diag H) I)^-1 = U^T U``.

    With J the reversal of rows, ``J H J = L L^T`` gives ``U = (J L J)^-1``: one factorization, no explicit inverse.
    """
    mean = jnp.maximum(jnp.mean(jnp.diagonal(gram)), 1e-30)
    # Scaled to mean 1 for float32's sake: a factor of U cancels in the update.
    damped = gram / mean + damping * jnp.eye(len(gram))
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(gram)), lower=True)[::-1, ::-1]


def solve(
    weight: Float[Array, "in out"], gram: Float[Array, "in in"], group_size: int, bits: int, config: GPTQConfig
) -> Float[Array, "in out"]:
    """The dequantized kernel of GPTQ; traceable.

    Args:
        weight: the float kernel.
        gram: ``H``, up to a factor.
        group_size: inputs a group.
        bits: width.
        config: damping, order and range.
    """
    dead = jnp.diagonal(gram) == 0  # inputs that are always zero
    weight = jnp.where(dead[:, None], 0.0, weight)
    gram = gram + jnp.diag(dead.astype(gram.dtype))
    if not config.act_order:
        return _sweep(weight, inverse_factor(gram, config.damping), group_size, bits, config)
    order = jnp.argsort(-jnp.diagonal(gram))
    grid = scale_and_zero(*shrunk_limits(weight, group_size, bits, config.shrink_steps), bits)
    scale, zero = (jnp.repeat(part, group_size, axis=0)[order] for part in grid)  # [in, out]: each row's own
    factor = inverse_factor(gram[order][:, order], config.damping)
    return _sweep(weight[order], factor, group_size, bits, config, (scale, zero))[jnp.argsort(order)]


def _sweep(
    weight: Float[Array, "in out"],
    factor: Float[Array, "in in"],
    group_size: int,
    bits: int,
    config: GPTQConfig,
    grids: tuple[Float[Array, "in out"], Float[Array, "in out"]] | None = None,
) -> Float[Array, "in out"]:
    """Rounds all rows in order, with the given grid of each row or, if None, each group's own when its turn comes."""

    def one_group(weight: Float[Array, "in out"], start: Int[Array, ""]) -> tuple[Array, Array]:
        rows = jax.lax.dynamic_slice_in_dim(weight, start, group_size)  # [size, out]
        above = jax.lax.dynamic_slice_in_dim(factor, start, group_size)  # [size, in]
        inside = jax.lax.dynamic_slice_in_dim(above, start, group_size, axis=1)  # [size, size]
        if grids is None:
            own = scale_and_zero(*shrunk_limits(rows, group_size, bits, config.shrink_steps), bits)
            scale, zero = (jnp.broadcast_to(part, rows.shape) for part in own)
        else:
            scale, zero = (jax.lax.dynamic_slice_in_dim(part, start, group_size) for part in grids)

        def one_row(rows: Float[Array, "size out"], i: Int[Array, ""]) -> tuple[Array, tuple[Array, Array]]:
            rounded = round_to_grid(rows[i][None], scale[i][None], zero[i][None], bits)[0]
            error = (rows[i] - rounded) / inside[i, i]
            # U is upper triangular, so rows before i stay as they are.
            return rows - inside[i][:, None] * error, (rounded, error)

        _, (rounded, errors) = jax.lax.scan(one_row, rows, jnp.arange(group_size), unroll=8)
        return weight - jnp.einsum("gi,go->io", above, errors, precision="highest"), rounded

    starts = jnp.arange(0, len(weight), group_size)
    return jax.lax.scan(one_group, weight, starts)[1].reshape(weight.shape)


def build(spec: QuantSpec) -> Callable[[BlockTask], BlockOutcome]:
    """GPTQ for the blocks of a model: linear after linear, each on inputs that the quantized ones before it made."""

    def quantize_group(
        paths: tuple[str, ...], settings: GPTQConfig, block: Params, stream: Float[Array, "N T D"]
    ) -> Params:
        kernels = get_kernels(block, spec.config)
        gram = capture(spec.config, block, stream, paths[:1], settings.weighting)[paths[0]].gram
        together = jnp.concatenate([kernels[path] for path in paths], axis=1)  # outputs are independent given H
        solved = solve(together, gram, spec.group_size, spec.bits, settings)
        ends = np.cumsum([kernels[path].shape[1] for path in paths])
        return with_kernels(block, dict(zip(paths, jnp.split(solved, ends[:-1], axis=1), strict=True)))

    def quantize_block(settings: GPTQConfig, block: Params, stream: Float[Array, "N T D"]) -> Params:
        for paths in INPUT_GROUPS:
            with jax.named_scope(f"gptq_{paths[0].split('/')[1]}"):
                block = quantize_group(paths, settings, block, stream)
        return block

    runs = jax.jit(jax.vmap(quantize_block, in_axes=(0, None, 0)))
    return lambda task: BlockOutcome(params=runs(task.settings, task.dense, task.quantized))
