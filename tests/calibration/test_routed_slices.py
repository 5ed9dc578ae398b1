"""Routed tuning of a slice alone: its loss against the packed runtime, what stays final, and what it brings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.distillation import distillation_loss
from mobiquant_jax.calibration.linears import pack_block, trainable
from mobiquant_jax.calibration.routed_slices import RoutedSliceTuner
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import FixedThreshold

EPOCHS = 12
FINAL, WIDTH = 2, 4
PAIRS = ((3.0, 0.0), (4.0, -np.inf))


@pytest.fixture(scope="module")
def sliced():
    """Three slices of which the first two are coarse."""
    return ElasticConfig(group_size=8, slice_bits=(2, 2, 4), router_hidden_size=4, budget_grid=(2.0, 3.0, 4.0, 8.0))


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(90).integers(0, 61, (6, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def packed(params, config, sliced):
    """The packed blocks, routers drawn at random."""

    def pack(dense, key):
        return pack_block(trainable(dense, config, sliced, key), config, sliced)

    return jax.vmap(pack)(params["layers"], jax.random.split(jax.random.key(91), config.num_hidden_layers))


@pytest.fixture(scope="module")
def tuner(config, sliced, recipe, windows):
    calibration = recipe(
        windows=6, budgets=(2.0, 3.0), fine_above=4, end_batch_size=1, routed_router_lr=0.05, routed_penalty=5.0
    )
    return RoutedSliceTuner(
        config=config,
        elastic=sliced,
        calibration=calibration,
        windows=windows,
        generated=windows[:0],
        pairs=np.array(PAIRS),
        final_width=FINAL,
        reads=(WIDTH,),
        epochs=EPOCHS,
        rate=2.0,
    )


@pytest.fixture(scope="module")
def begun(tuner, packed, params):
    return tuner.begin(packed, params["layers"])


@pytest.fixture(scope="module")
def tuned(tuner, begun, params, packed):
    """The packed blocks after the last epoch."""
    state = tuner.init(begun)
    for epoch in range(EPOCHS):
        state, _, healthy = tuner.epoch(state, params, epoch)
        assert healthy
    return tuner.pack(packed, jax.device_get(state.params))


@pytest.fixture(scope="module")
def read(config, sliced, params, windows):
    """``(packed layers, threshold) -> (divergence, mean bits)`` of the model; coarse slices only."""

    def shut_last(path, leaf):
        return leaf.at[..., -1].set(-1e30) if getattr(path[-1], "name", "") == "output_bias" else leaf

    @jax.jit
    def run(layers, threshold):
        variables = {
            "params": {**params, "layers": jax.tree_util.tree_map_with_path(shut_last, layers["params"])},
            "slices": {"layers": layers["slices"]},
            "routing": {"layers": layers["routing"]},
        }
        model = ElasticModel(config=config, elastic=sliced, variables=variables)
        logits, bits = model.forward_with(variables, windows, FixedThreshold(threshold=threshold))
        return distillation_loss(logits, Llama(config).apply({"params": params}, windows)), jnp.mean(bits)

    return run


@pytest.mark.parametrize(("budget", "threshold"), [(2.0, np.inf), (3.0, 0.0), (3.5, -0.2), (4.0, -1e9)])
def test_the_loss_is_that_of_the_packed_model_and_the_penalty(
    tuner, begun, packed, params, config, windows, read, budget, threshold
):
    drawn = jnp.array([budget, threshold], jnp.float32)
    target = Llama(config).apply({"params": params}, windows)
    loss, divergence = jax.jit(tuner._loss)(begun, params, target, windows, drawn)
    expected, bits = read(tuner.pack(packed, begun), threshold)
    assert divergence == pytest.approx(float(expected), rel=1e-3)
    assert loss == pytest.approx(np.log(float(expected) + 1e-6) + 5.0 * (float(bits) - budget) ** 2, rel=1e-3, abs=1e-3)


def weights(layers):
    leaves = jax.tree.leaves(layers["slices"], is_leaf=lambda node: isinstance(node, SlicedWeight))
    assert len(leaves) == 7
    return leaves


def read_at(weight, width):
    return np.asarray(jax.vmap(lambda layer: layer.dequantize_width(width))(weight))


def test_final_bits_stay_and_the_slice_and_its_routers_move(tuned, packed):
    for width in (1, 2, 4):
        before, after = ([read_at(weight, width) for weight in weights(layers)] for layers in (packed, tuned))
        moved = [np.any(a != b) for a, b in zip(after, before, strict=True)]
        assert all(moved) if width > FINAL else not any(moved)
    for part, name in (("attention", "q_proj"), ("mlp", "down_proj")):
        before, after = (np.asarray(layers["params"][part][name]["router"].output_bias) for layers in (packed, tuned))
        assert np.all(after[:, 0] != before[:, 0])
        np.testing.assert_array_equal(after[:, -1], before[:, -1])
    for norm in ("attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, tuned["params"][norm], packed["params"][norm])


def test_tuning_brings_the_model_nearer_at_the_bits_asked_for(read, packed, tuner, begun, tuned):
    start = tuner.pack(packed, begun)
    for budget, threshold in PAIRS:
        before, _ = read(start, max(threshold, -1e9))
        after, bits = read(tuned, max(threshold, -1e9))
        assert abs(float(bits) - budget) < 0.15  # at first all gates are open at both thresholds
        assert budget == 3.0 or after < 0.9 * before
    assert read(tuned, np.inf)[0] == read(start, np.inf)[0]


def test_what_is_final_has_no_gradient(tuner, begun, params, config, windows):
    target = Llama(config).apply({"params": params}, windows)
    gradient = jax.jit(jax.grad(lambda *args: tuner._loss(*args)[0]))
    for threshold, moves in ((np.inf, False), (-1e9, True)):
        grads = gradient(begun, params, target, windows, jnp.array([3.0, threshold], jnp.float32))
        assert np.any(grads["mlp"]["up_proj"]["position"]) == moves
        assert not np.any(grads["mlp"]["up_proj"]["scale"]) and not np.any(grads["mlp"]["up_proj"]["zero"])
