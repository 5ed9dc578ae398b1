"""Routing and product in one go on a GPU: ``JAX_PLATFORMS=cuda python -m pytest -m gpu tests``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.ops import tile_weight
from mobiquant_jax.ops.sliced_matmul import routed_gpu
from mobiquant_jax.ops.sliced_matmul.routed_gpu import routed_matmul
from mobiquant_jax.routing import FusedRouter

LAYERS = 3


@pytest.fixture
def on_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


def draw_router(rng, inputs, linears, width):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return FusedRouter(
        hidden=(normal(LAYERS, inputs, linears * width) / np.sqrt(inputs)).astype(jnp.bfloat16),
        magnitude=0.3 * normal(LAYERS, linears, width),
        hidden_bias=0.3 * normal(LAYERS, linears, width),
        output=normal(LAYERS, linears, width, 3) / np.sqrt(width),
        output_bias=jnp.asarray([0.5, 0.0, -0.5]) + jnp.zeros((LAYERS, linears, 3)),
        thresholds=jnp.zeros((LAYERS, linears, 2)),
        grid=(2.0, 8.0),
    )


def exact(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def exact_scores(router, layer, x):
    """Scores ``[S, N, 3]`` in float64 of an input in float64."""
    linears, width = router.magnitude.shape[1:]
    rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-12)
    scores = []
    for s in range(linears):
        hidden = x / rms @ exact(router.hidden[layer])[:, s * width : (s + 1) * width]
        hidden += np.log(rms) * exact(router.magnitude[layer, s]) + exact(router.hidden_bias[layer, s])
        hidden /= 1 + np.exp(-hidden)
        scores.append(hidden @ exact(router.output[layer, s]) + exact(router.output_bias[layer, s]))
    return np.stack(scores)


def draw_source(rng, kind, tokens, inputs):
    """Arguments of `routed_matmul`, the input in float64 and the residual stream."""
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), jnp.bfloat16)
    if kind == "plain":
        return {"x": x}, exact(x), None
    if kind == "gated":
        update = jnp.asarray(rng.normal(size=(2, tokens, 2 * inputs)), jnp.float32)
        gate, up = np.split(exact(jnp.sum(update, axis=0).astype(jnp.bfloat16)), 2, axis=-1)
        return {"update": update}, gate / (1 + np.exp(-gate)) * up, None
    update = jnp.asarray(3 * rng.normal(size=(2, tokens, inputs)), jnp.float32)
    gain = jnp.asarray(rng.uniform(0.2, 2, (LAYERS, inputs)), jnp.float32)
    residual = x + jnp.sum(update, axis=0).astype(jnp.bfloat16)
    wide = exact(residual)
    normed = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    return {"x": x, "update": update, "gain": gain, "eps": 1e-5}, normed * exact(gain[1]), residual


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "width"),
    [(4096, (1024, 256, 256), 128, 64), (14336, (256,), 128, 64), (576, (576, 192), 64, 32), (160, (172, 172), 32, 8)],
)
def test_matches_float64(on_gpu, kind, tokens, inputs, outputs, group_size, width, stacked_weights, exact_product):
    rng = np.random.default_rng(tokens * 7 + inputs)
    weights = stacked_weights(rng, LAYERS, inputs, outputs, group_size)
    router = draw_router(rng, inputs, len(outputs), width)
    arguments, x, residual = draw_source(rng, kind, tokens, inputs)
    scores = exact_scores(router, 1, x)
    thresholds = jnp.asarray(rng.normal(size=(LAYERS, len(outputs), tokens)), jnp.float32)
    got = jax.jit(routed_matmul, static_argnames=("source", "eps"))(
        kind, tile_weight(weights), router, thresholds, jnp.int32(1), **arguments
    )
    margin = scores - exact(thresholds[1])[..., None]
    want = 1 + np.cumprod(margin > 0, axis=-1).sum(axis=-1)
    depths = np.asarray(got.depths)
    clear = (np.abs(margin) > 0.02).all(axis=-1)  # elsewhere rounding may decide
    np.testing.assert_array_equal(depths[clear], want[clear])
    assert clear.mean() > 0.8 and (tokens == 1 or len(np.unique(depths)) > 1)
    if residual is not None:
        np.testing.assert_array_equal(exact(got.residual), exact(residual))
    y = np.asarray(got.parts, np.float64).sum(axis=0)
    product = np.asarray(exact_product(jnp.asarray(x, jnp.float32), weights, jnp.asarray(depths), 1))
    # The kernel's input is bfloat16: its rounding, 2^-9 at most, shrinks in the sum over the inputs.
    assert np.isfinite(y).all() and np.linalg.norm(y - product) / np.linalg.norm(product) < 3e-3


@pytest.mark.gpu
def test_the_same_input_gives_the_same_depths_alone_and_in_a_batch(on_gpu, stacked_weights):
    rng = np.random.default_rng(5)
    weights = tile_weight(stacked_weights(rng, LAYERS, 1024, (128,), 128))
    router = draw_router(rng, 1024, 1, 64)
    arguments, _, _ = draw_source(rng, "normed", 16, 1024)
    thresholds = jnp.zeros((LAYERS, 1, 16))
    together = routed_matmul("normed", weights, router, thresholds, jnp.int32(1), **arguments)
    for t in (0, 9):
        one = arguments | {"x": arguments["x"][t : t + 1], "update": arguments["update"][:, t : t + 1]}
        alone = routed_matmul("normed", weights, router, thresholds[..., :1], jnp.int32(1), **one)
        assert int(alone.depths[0, 0]) == int(together.depths[0, t])
        np.testing.assert_array_equal(np.asarray(alone.parts[:, 0]), np.asarray(together.parts[:, t]))


def test_where_it_cannot_run_it_says_why(stacked_weights):
    rng = np.random.default_rng(0)
    weight = tile_weight(stacked_weights(rng, 1, 128, (16,), 64))
    reason = "17" if jax.default_backend() == "gpu" else "Hopper"
    with pytest.raises(NotImplementedError, match=reason):
        routed_gpu.check_supported(17, weight, draw_router(rng, 128, 1, 8))
