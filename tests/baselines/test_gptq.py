"""GPTQ's solver against a plain float64 one, and its Gram matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import GPTQConfig, Run, gptq, quantize_blocks
from mobiquant_jax.baselines.capture import TokenWeighting, capture, moments
from mobiquant_jax.baselines.gptq import inverse_factor
from mobiquant_jax.baselines.kernels import get_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import block_forward
from mobiquant_jax.models import Llama, rms_norm

GROUP, ROWS, COLUMNS = 8, 48, 40
solve = jax.jit(gptq.solve, static_argnums=(2, 3))


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the Gram matrix of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(400, ROWS)) @ (rng.normal(size=(ROWS, ROWS)) * np.exp(rng.normal(size=(1, ROWS))))
    return rng.normal(size=(ROWS, COLUMNS)).astype(np.float32), (inputs.T @ inputs / 400).astype(np.float32)


def grid(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of one group, ``[out]``."""
    scale = (weight.max(0) - weight.min(0)) / (2**bits - 1)
    return scale, np.round(-weight.min(0) / scale)


def reference(weight: np.ndarray, gram: np.ndarray, bits: int, damping: float, act_order: bool) -> np.ndarray:
    """Optimal brain quantization in a fixed order, from the plain inverse, an input at a time, all in float64.

    After input i is rounded, the others move by -(w_i - q_i) / [H^-1]_ii [H^-1]_i:, and i leaves H^-1 by elimination.
    """
    weight, gram = weight.astype(np.float64).copy(), gram.astype(np.float64)
    inverse = np.linalg.inv(gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram)))
    static = [grid(weight[start : start + GROUP], bits) for start in range(0, len(weight), GROUP)]
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(len(gram))
    rounded = np.zeros_like(weight)
    for count, i in enumerate(order):
        if act_order:
            scale, zero = static[i // GROUP]
        elif i % GROUP == 0:
            scale, zero = grid(weight[i : i + GROUP], bits)
        codes = np.clip(np.round(weight[i] / scale) + zero, 0, 2**bits - 1)
        rounded[i] = scale * (codes - zero)
        rest = order[count + 1 :]
        weight[rest] -= np.outer(inverse[rest, i] / inverse[i, i], weight[i] - rounded[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return rounded


def loss(weight: np.ndarray, rounded: np.ndarray, gram: np.ndarray) -> float:
    difference = np.asarray(rounded, np.float64) - weight
    return float(np.einsum("io,ij,jo->", difference, gram.astype(np.float64), difference))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_solver_equals_plain_elimination_in_float64(bits: int, act_order: bool):
    weight, gram = problem(bits)
    config = GPTQConfig(damping=0.02, act_order=act_order)
    found = np.asarray(solve(jnp.asarray(weight), jnp.asarray(gram), GROUP, bits, config))
    wanted = reference(weight, gram, bits, 0.02, act_order)
    same = np.abs(found - wanted).max(axis=0) < 1e-3  # a column differs from where one weight falls to the other side
    assert same.mean() >= 0.9
    assert loss(weight, found, gram) == pytest.approx(loss(weight, wanted, gram), rel=0.02)
    nearest = round_to_nearest(jnp.asarray(weight), GROUP, bits)
    assert loss(weight, found, gram) < 0.6 * loss(weight, nearest, gram)


def test_factor_is_that_of_the_damped_inverse():
    _, gram = problem(11)
    upper = np.asarray(inverse_factor(jnp.asarray(gram), 0.01), np.float64)
    assert np.array_equal(upper, np.triu(upper))
    mean = np.mean(np.diag(gram.astype(np.float64)))
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(gram / mean + 0.01 * np.eye(ROWS)), rtol=2e-3, atol=1e-3)


def test_range_search_lowers_the_loss_and_leaves_the_grid():
    weight, gram = problem(12)
    weight = np.random.default_rng(13).standard_t(3, weight.shape).astype(np.float32)
    plain, shrunk = (
        solve(jnp.asarray(weight), jnp.asarray(gram), GROUP, 2, GPTQConfig(shrink_steps=steps)) for steps in (0, 10)
    )
    assert np.mean(np.square(shrunk - weight)) < np.mean(np.square(plain - weight))
    assert (
        max(
            len(np.unique(part))
            for part in np.asarray(shrunk).reshape(-1, GROUP, COLUMNS).transpose(0, 2, 1).reshape(-1, GROUP)
        )
        <= 4
    )


def test_inputs_that_are_always_zero_do_no_harm():
    weight, gram = problem(14)
    gram[5], gram[:, 5] = 0, 0
    found = np.asarray(solve(jnp.asarray(weight), jnp.asarray(gram), GROUP, 3, GPTQConfig()))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[5], 0, atol=0.3)  # zero, or the code next to it
    others = np.delete(np.arange(ROWS), 5)
    nearest = round_to_nearest(jnp.asarray(weight), GROUP, 3)
    assert loss(weight[others], found[others], gram[np.ix_(others, others)]) < loss(weight, nearest, gram)


@pytest.mark.parametrize(("exponent", "first"), [(0.0, 1.0), (1.0, 1.0), (0.5, 64.0)])
def test_moments_weight_tokens(exponent: float, first: float):
    x = np.random.default_rng(15).normal(size=(3, 7, 10)) * np.exp(np.random.default_rng(16).normal(size=(3, 7, 1)))
    weight = np.mean(x**2, axis=-1) ** -exponent
    weight[:, 0] *= first
    found = moments(jnp.asarray(x, jnp.float32), TokenWeighting(exponent=exponent, first=first))
    np.testing.assert_allclose(found.gram, np.einsum("bt,bti,btj->ij", weight, x, x) / 21, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.magnitude, np.einsum("bt,bti->i", weight**0.5, np.abs(x)) / 21, rtol=1e-4)


def test_weighting_by_energy_makes_a_sink_count_as_one_token():
    """``|x|^-2 x x^T`` does not change with the length of x, so however large the first token is, all stays the same.

    Without weights its share of H grows with its square, and with it the damping that all others feel.
    """
    rng = np.random.default_rng(18)
    windows = rng.normal(size=(8, 32, ROWS)) @ (rng.normal(size=(ROWS, ROWS)) * np.exp(rng.normal(size=(1, ROWS))))
    weight = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)

    def of_sink(size: float, exponent: float) -> tuple[np.ndarray, np.ndarray]:
        sink = jnp.asarray(windows * np.where(np.arange(32) == 0, size, 1.0)[:, None], jnp.float32)
        gram = moments(sink, TokenWeighting(exponent=exponent)).gram
        return np.asarray(gram), np.asarray(solve(jnp.asarray(weight), gram, GROUP, 3, GPTQConfig()))

    (gram, kernel), (same_gram, same_kernel) = of_sink(1.0, 1.0), of_sink(1024.0, 1.0)
    np.testing.assert_allclose(same_gram, gram, rtol=1e-4, atol=1e-4 * np.abs(gram).max())
    assert np.trace(gram) == pytest.approx(ROWS, rel=1e-5)  # every token brings the same energy
    assert np.mean(np.abs(kernel - same_kernel).max(axis=0) < 1e-3) > 0.9  # by columns, as above
    plain_gram, plain_kernel = of_sink(1024.0, 0.0)
    without = np.einsum("bti,bti->", windows[:, 1:], windows[:, 1:]) / windows[..., 0].size
    assert np.trace(plain_gram) > 1000 * without  # 31 to 1 in tokens, 1024^2 to 1 in energy
    assert np.mean(np.abs(of_sink(1.0, 0.0)[1] - plain_kernel).max(axis=0) < 1e-3) < 0.5


@pytest.mark.parametrize("field", ["energy_exponent", "first_token"])
def test_the_weighting_reaches_every_linear(field: str, spec, builders, config, params, windows):
    runs = [Run(settings=settings) for settings in (GPTQConfig(), GPTQConfig(**{field: 4.0}))]
    plain, weighted = quantize_blocks(spec, builders["gptq"], params, windows, runs)
    for path, kernel in get_kernels(plain.params["layers"], config).items():
        other = get_kernels(weighted.params["layers"], config)[path]
        assert np.mean(np.abs(kernel[0] - other[0]) > 1e-4) > 0.002, path


def test_each_linear_is_solved_on_what_the_quantized_ones_before_it_make(spec, builders, config, params, windows):
    runs = [Run(settings=GPTQConfig()), Run(settings=GPTQConfig(damping=0.1))]
    model, _ = quantize_blocks(spec, builders["gptq"], params, windows, runs)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], model.params["layers"]) for i in (0, 1))
    dense = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), params["layers"])
    embedded = Llama(config).apply({"params": params}, jnp.asarray(windows), method="embed")
    stream = block_forward(config, first, embedded)

    @jax.jit
    def solved(block, stream):
        gram = capture(config, block, stream, ("attention/o_proj",), TokenWeighting())["attention/o_proj"].gram
        return gptq.solve(dense["attention"]["o_proj"]["kernel"], gram, spec.group_size, spec.bits, GPTQConfig())

    def same_columns(block, stream) -> float:
        difference = solved(block, stream) - second["attention"]["o_proj"]["kernel"]
        return float(np.mean(np.abs(difference).max(axis=0) < 1e-3))

    partly = {"attention": second["attention"] | {"o_proj": dense["attention"]["o_proj"]}}
    assert same_columns(dense | partly, stream) > 0.9
    assert same_columns(dense, stream) < 0.5  # with q, k, v as they were
    full = block_forward(config, jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params["layers"]), embedded)
    assert same_columns(dense | partly, full) < 0.5  # with the first block as it was


def test_capture_sees_what_enters_each_linear(config, block):
    stream = jnp.asarray(np.random.default_rng(17).normal(size=(6, 9, config.hidden_size)), jnp.float32)
    found = capture(config, block, stream, ("attention/q_proj", "mlp/down_proj"), TokenWeighting())
    assert set(found) == {"attention/q_proj", "mlp/down_proj"}
    normed = np.asarray(rms_norm(stream, block["attention_norm"]["scale"], config.rms_norm_eps), np.float64)
    np.testing.assert_allclose(
        found["attention/q_proj"].gram, np.einsum("bti,btj->ij", normed, normed) / 54, rtol=1e-4, atol=1e-5
    )
    # The MLP's part of the output, W^T H W summed over channels, is what the block without it lacks.
    silent = block | {
        "mlp": block["mlp"] | {"down_proj": {"kernel": jnp.zeros_like(block["mlp"]["down_proj"]["kernel"])}}
    }
    part = np.asarray(block_forward(config, block, stream) - block_forward(config, silent, stream), np.float64)
    down = np.asarray(block["mlp"]["down_proj"]["kernel"], np.float64)
    energy = np.einsum("io,ij,jo->o", down, np.asarray(found["mlp/down_proj"].gram, np.float64), down)
    np.testing.assert_allclose(energy, np.mean(part**2, axis=(0, 1)), rtol=1e-3)
