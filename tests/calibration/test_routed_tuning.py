"""Routed tuning: its loss against the packed runtime at the same threshold, what moves, and what it brings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.distillation import distillation_loss
from mobiquant_jax.calibration.linears import trainable
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.routing import FixedThreshold

EPOCHS = 6
BUDGETS = (2.0, 3.0, 4.0)
THRESHOLDS = (np.inf, 0.0, -np.inf)


@pytest.fixture(scope="module")
def sliced():
    """Three slices of which the first two are coarse."""
    return ElasticConfig(group_size=8, slice_bits=(2, 2, 4), router_hidden_size=4, budget_grid=(2.0, 3.0, 4.0, 8.0))


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(80).integers(0, 61, (6, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def start(params, config, sliced):
    """Trainable parameters of the blocks, routers drawn at random."""
    keys = jax.random.split(jax.random.key(81), config.num_hidden_layers)
    return jax.vmap(lambda dense, key: trainable(dense, config, sliced, key))(params["layers"], keys)


@pytest.fixture(scope="module")
def make_tuner(config, sliced, recipe, windows):
    def make(**changes):
        fields = dict(
            windows=6,
            budgets=(2.0, 3.0),
            fine_above=4,
            routed_epochs=EPOCHS,
            routed_weight_lr=1e-3,
            routed_router_lr=0.05,
            routed_penalty=5.0,
        )
        return RoutedTrainer(
            config=config,
            elastic=sliced,
            calibration=recipe(**(fields | changes)),
            windows=windows,
            generated=windows[:0],
            pairs=np.stack([BUDGETS, THRESHOLDS], axis=-1),
        )

    return make


@pytest.fixture(scope="module")
def tuner(make_tuner):
    return make_tuner()


@pytest.fixture(scope="module")
def tuned(tuner, start, params):
    """The parameters after the last epoch."""
    state = tuner.init(start)
    for epoch in range(EPOCHS):
        state, _, healthy = tuner.epoch(state, params, epoch)
        assert healthy
    return jax.device_get(state.params)


@pytest.fixture(scope="module")
def read(config, sliced, params, tuner, windows):
    """``(trained parameters, threshold) -> (divergence, mean bits)`` of the packed model; coarse slices only."""

    @jax.jit
    def run(trained, threshold):
        layers = tuner.pack(trained)
        variables = {
            "params": {**params, "layers": layers["params"]},
            "slices": {"layers": layers["slices"]},
            "routing": {"layers": layers["routing"]},
        }
        model = ElasticModel(config=config, elastic=sliced, variables=variables)
        shut = jax.tree_util.tree_map_with_path(shut_last, variables["params"]["layers"])
        variables["params"]["layers"] = shut
        logits, bits = model.forward_with(variables, windows, FixedThreshold(threshold=threshold))
        target = Llama(config).apply({"params": params}, windows)
        return distillation_loss(logits, target), jnp.mean(bits)

    return run


def shut_last(path, leaf):
    """The last slice's scores far below any threshold."""
    return leaf.at[..., -1].set(-1e30) if getattr(path[-1], "name", "") == "output_bias" else leaf


@pytest.mark.parametrize(("budget", "threshold"), [(2.0, np.inf), (3.0, 0.0), (3.5, -0.2), (4.0, -1e9)])
def test_the_loss_is_that_of_the_packed_model_and_the_penalty(
    tuner, start, params, config, windows, read, budget, threshold
):
    drawn = jnp.array([budget, threshold], jnp.float32)
    target = Llama(config).apply({"params": params}, windows)
    loss, divergence = jax.jit(tuner._loss)(start, params, target, windows, drawn)
    expected, bits = read(start, threshold)
    assert divergence == pytest.approx(float(expected), rel=1e-3)
    assert loss == pytest.approx(np.log(float(expected) + 1e-6) + 5.0 * (float(bits) - budget) ** 2, rel=1e-3, abs=1e-3)
    if threshold in (np.inf, -1e9):
        assert bits == budget


def test_tuning_brings_the_model_nearer_at_every_budget_and_routers_to_the_bits_asked_for(read, start, tuned):
    before, after = ([read(params, max(tau, -1e9)) for tau in THRESHOLDS] for params in (start, tuned))
    assert before[1][1] == 4.0  # the routers that it starts from open every gate at the middle threshold
    assert [round(float(bits), 1) for _, bits in after] == list(BUDGETS)
    for index in (0, 2):
        assert after[index][0] < 0.8 * before[index][0]
    assert after[0][0] > after[1][0] > after[2][0]


def test_only_what_has_a_rate_moves(tuned, start, make_tuner, params):
    before, after = (jax.device_get(tree)["mlp"]["up_proj"] for tree in (start, tuned))
    for name in ("kernel", "clipping", "router"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before[name], after[name])
        assert max(jax.tree.leaves(moved)) > 1e-4, name
    np.testing.assert_array_equal(after["router"].output_bias[:, -1], before["router"].output_bias[:, -1])
    np.testing.assert_array_equal(tuned["mlp_norm"]["scale"], start["mlp_norm"]["scale"])
    frozen = make_tuner(routed_weight_lr=0.0, routed_clipping_lr=0.0, routed_router_lr=0.0)
    state, _, _ = frozen.epoch(frozen.init(start), params, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, start)


def test_budgets_come_with_their_thresholds(tuner):
    drawn = tuner.draw_steps(np.random.default_rng(82))
    assert drawn.shape == (6, 2) and drawn.dtype == np.float32
    assert sorted(map(tuple, drawn[:3].tolist())) == sorted(zip(BUDGETS, THRESHOLDS, strict=True))


def test_an_infinite_threshold_leaves_gradients_finite(tuner, start, params, config, windows):
    target = Llama(config).apply({"params": params}, windows)
    gradient = jax.jit(jax.grad(lambda *args: tuner._loss(*args)[0]))
    for budget, threshold in zip(BUDGETS, THRESHOLDS, strict=True):
        grads = gradient(start, params, target, windows, jnp.array([budget, threshold], jnp.float32))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        routers = (grads[part][name]["router"] for part, name in (("attention", "q_proj"), ("mlp", "down_proj")))
        assert any(np.any(leaf) for leaf in jax.tree.leaves(list(routers))) == np.isfinite(threshold)
