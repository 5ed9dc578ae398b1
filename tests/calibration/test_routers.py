"""Routers fitted to gains: the gains against float64, the theory against a divergence, the fit against the truth."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mobiquant_jax.analysis.depth_table import forward_at
from mobiquant_jax.analysis.divergence import kullback_leibler
from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.calibration.gains import scored_matmul
from mobiquant_jax.calibration.routers import RouterTrainer, magnitude_router, routers_of, with_routers
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.quant import round_to_nearest
from mobiquant_jax.routing import Router, depth_masks, score

IN, OUT, SLICES = 16, 6, 4
PRICES = (0.5, 1.0, 3.0)
STEPS = 1500
BELOW = -12.0


@pytest.fixture
def rng():
    return np.random.default_rng()  # fresh inputs every time


def linear(rng):
    kernel = jnp.asarray(rng.normal(size=(IN, OUT)), jnp.float32)
    weight = round_to_nearest(kernel, 8)
    reads = np.stack([np.asarray(weight.dequantize(k), np.float64) for k in range(1, SLICES + 1)])
    return weight, reads


def test_the_backward_pass_against_float64(rng):
    """The product, its gradient to the input, and ``1 - gain exp(-S)`` to the scores; masks and weight get none."""
    weight, reads = linear(rng)
    x, g = (rng.normal(size=(2, 5, size)).astype(np.float32) for size in (IN, OUT))
    scores = rng.normal(size=(2, 5, SLICES - 1)).astype(np.float32)
    depth = rng.integers(1, SLICES + 1, (2, 5))
    masks = depth_masks(jnp.asarray(depth), SLICES)
    y, back = jax.vjp(lambda x, m, s: scored_matmul(x, weight, m, s, PRICES), x, masks, scores)
    to_x, to_masks, to_scores = back(jnp.asarray(g))

    chosen = reads[depth - 1]  # [2, 5, in, out]
    np.testing.assert_allclose(y, np.einsum("bti,btio->bto", x, chosen), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_x, np.einsum("bto,btio->bti", g, chosen), rtol=1e-4, atol=1e-4)
    removed = np.einsum("bti,eio,bto->bte", x, np.diff(reads, axis=0), g)  # what slices 2..E change, along g
    gains = removed**2 / (2 * np.array(PRICES))
    np.testing.assert_allclose(to_scores, 1 - gains * np.exp(-scores), rtol=1e-3, atol=1e-4)
    assert not np.any(to_masks)


def test_half_the_squared_slope_along_an_error_is_the_divergence_it_costs(rng):
    """E over labels drawn from a softmax of 1/2 (g . e)^2, against the exact divergence, for small errors."""
    logits, error = rng.normal(size=9), 1e-3 * rng.normal(size=9)
    p = np.exp(logits) / np.exp(logits).sum()
    q = np.exp(logits + error) / np.exp(logits + error).sum()
    slopes = p - np.eye(9)  # of the loss of each label
    expected = p @ (slopes @ error) ** 2 / 2
    assert expected == pytest.approx(np.sum(p * np.log(p / q)), rel=0.01)


def test_fitted_scores_are_the_logarithm_of_the_mean_gain(rng):
    """Two kinds of tokens, told apart by the direction of their input, whose gains differ by a factor of 30."""
    weight, reads = linear(rng)
    kinds = rng.normal(size=(2, IN)) / IN**0.5
    router = Router.create(jax.random.key(rng.integers(2**31)), IN, 8, SLICES)
    sigma = np.array([1.0, 30.0]) ** 0.5  # of the gradients
    removed = np.einsum("ki,eio->keo", kinds, np.diff(reads, axis=0))
    means = sigma[:, None] ** 2 * np.sum(removed**2, axis=-1) / (2 * np.array(PRICES))  # [kind, slice]
    x = jnp.asarray(np.broadcast_to(kinds, (64, 2, IN)), jnp.float32)  # [B, T = kind, in]
    masks = jnp.zeros((64, 2, SLICES - 1))

    adam = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))

    @jax.jit
    def step(router, state, average, key):
        def loss(router):
            y = scored_matmul(x, weight, masks, score(router, x), PRICES)
            # A loss of slope g, normal and of the kind's own spread.
            g = jax.random.normal(key, y.shape) * jnp.asarray(sigma)[:, None]
            return jnp.sum(y * g)

        updates, state = adam.update(jax.grad(loss)(router), state)
        router = optax.apply_updates(router, updates)
        return router, state, 0.99 * average + 0.01 * score(router, x)[0]

    state, average = adam.init(router), score(router, x)[0]
    for key in jax.random.split(jax.random.key(rng.integers(2**31)), STEPS):
        router, state, average = step(router, state, average, key)
    np.testing.assert_allclose(average, np.log(means), atol=0.35)


@pytest.fixture(scope="module")
def model(random_elastic, elastic):
    return random_elastic(61, elastic, vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2)


@pytest.fixture(scope="module")
def trainer(model, recipe):
    windows = np.random.default_rng(62).integers(0, 61, (4, 16)).astype(np.int32)
    calibration = recipe(fit_batch_size=2, fit_epochs=3, fit_lr=3e-3)
    return RouterTrainer(model=model, calibration=calibration, windows=windows)


@pytest.fixture(scope="module")
def start(model, trainer):
    """Makes the state before the first epoch; an epoch donates the one it is given."""
    state = jax.device_get(trainer.start(model.variables))
    return lambda: jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state))


def test_a_router_of_magnitudes():
    router = magnitude_router(Router.create(jax.random.key(0), IN, 8, SLICES), offset=1.5)
    x = np.random.default_rng(63).normal(size=(7, IN)) * np.geomspace(1e-3, 1e3, 7)[:, None]
    expected = np.log(np.mean(x**2, axis=-1)) + 1.5
    scores = score(router, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(scores, np.repeat(expected[:, None], SLICES - 1, 1), rtol=1e-3, atol=1e-3)


def test_at_the_start_every_score_has_the_mean_gain_of_the_steps_that_were_measured(model, trainer, start):
    """The bias' gradient, ``1 - mean(gain exp(-S))``, is zero on those steps, whatever the size of the gains."""
    gradients = trainer._measure(start().routers, model.variables, trainer._plan(0, 2))
    biases = [linear["router"].output_bias for part in gradients.values() for linear in part.values()]
    np.testing.assert_allclose(biases, np.zeros_like(biases), atol=1e-4)


def test_the_start_measures_every_budget_however_few_the_windows(trainer, recipe):
    """Five batches of two of the four windows."""
    few = dataclasses.replace(
        trainer, calibration=recipe(fit_batch_size=2, budgets=(4.0, 5.0, 6.0, 7.0, 8.0), windows=5)
    )
    seen = []
    few.__dict__["_measure"] = lambda routers, variables, plan: seen.append(jax.device_get(plan)) or routers
    few.__dict__["_begin"] = lambda routers, gradients: None
    few.start(trainer.model.variables)
    tokens, bits, _ = zip(*seen[0], strict=True)
    assert len(seen) == 1 and sorted(bits) == [4, 5, 6, 7, 8] and np.shape(tokens) == (5, 2, 16)
    windows, counts = np.unique(np.concatenate(tokens), axis=0, return_counts=True)
    np.testing.assert_array_equal(windows, np.unique(few.windows, axis=0))
    assert set(counts) == {2, 3}


def test_an_epoch_moves_routers_only_and_is_determined_by_its_number(model, trainer, start):
    state, programs = start(), trainer._gradients._cache_size()  # the start has compiled it
    first, healthy = trainer.epoch(state, model.variables, 0)
    again, _ = trainer.epoch(start(), model.variables, 0)
    other, _ = trainer.epoch(start(), model.variables, 1)
    assert healthy
    jax.tree.map(np.testing.assert_array_equal, first, again)
    hidden = [state.routers["mlp"]["up_proj"]["router"].hidden for state in (start(), first, other)]
    assert np.any(hidden[0] != hidden[1]) and np.any(hidden[1] != hidden[2])
    changed = with_routers(model.variables, first.routers)
    assert changed["slices"] is model.variables["slices"]
    assert changed["params"]["layers"]["mlp_norm"] is model.variables["params"]["layers"]["mlp_norm"]
    assert jax.tree.structure(changed) == jax.tree.structure(model.variables)
    assert trainer._gradients._cache_size() == programs and trainer._update._cache_size() == 1


def test_the_shapes_to_compile_ahead_for_are_those_of_a_step(model, trainer):
    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)

    state = trainer.start(model.variables)
    _, shapes = trainer.abstract_step
    assert shapes[1] is model.variables
    assert described(shapes[::2]) == described((state, trainer._plan(1, 2)[0]))
    assert described(trainer.epoch(state, model.variables, 0)[0]) == described(shapes[0])


def test_a_step_that_is_not_finite_is_left_out(model, trainer, start):
    embedder = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model.variables["params"]["embedder"])
    poisoned = {**model.variables, "params": {**model.variables["params"], "embedder": embedder}}
    state, healthy = trainer.epoch(start(), poisoned, 0)
    assert not healthy
    jax.tree.map(np.testing.assert_array_equal, state.routers, start().routers)


def test_scores_that_are_kept_stay_and_the_others_are_fitted(random_elastic, recipe):
    """The last slice's score starts at its mean gain and is fitted with the hidden units as they are."""
    elastic = ElasticConfig(group_size=8, slice_bits=(4, 2, 2), router_hidden_size=4, budget_grid=(4.0, 6.0, 8.0))
    model = random_elastic(66, elastic, vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    windows = np.random.default_rng(67).integers(0, 61, (4, 16)).astype(np.int32)
    calibration = recipe(fit_batch_size=2, fit_epochs=1, fit_lr=0.1, budgets=(4.0, 8.0))
    trainer = RouterTrainer(model=model, calibration=calibration, windows=windows, kept=1)
    assert trainer._budgets == (8.0,)
    assert dataclasses.replace(trainer, kept=0, most_bits=6.0)._budgets == (4.0,)
    state = trainer.start(model.variables)
    gradients = trainer._measure(state.routers, model.variables, trainer._plan(0, 1))
    before = jax.device_get(state.routers)
    after, healthy = trainer.epoch(state, model.variables, 0)
    assert healthy
    for part, name in (path.split("/") for path in model.config.linear_shapes()):
        first, started, fitted = (
            tree[part][name]["router"] for tree in (routers_of(model.variables), before, after.routers)
        )
        np.testing.assert_allclose(gradients[part][name]["router"].output_bias, 0, atol=1e-4)
        for field in ("hidden", "magnitude", "hidden_bias"):
            for router in (started, fitted):
                np.testing.assert_array_equal(getattr(router, field), getattr(first, field))
        for field in ("output", "output_bias"):
            old, start, new = (np.asarray(getattr(router, field)) for router in (first, started, fitted))
            np.testing.assert_array_equal(start[..., 0], old[..., 0])
            np.testing.assert_array_equal(new[..., 0], old[..., 0])
            assert np.any(new[..., 1] != start[..., 1])


@pytest.fixture(scope="module")
def gains_of(random_elastic):
    """``(bits, draws) -> [L, N, E-1]``: the mean gain of every slice, of a model whose linears differ in size."""
    elastic = ElasticConfig(group_size=8, slice_bits=(4, 2, 2), router_hidden_size=4, budget_grid=(4.0, 5.0, 8.0))
    model = random_elastic(61, elastic, vocab_size=61, hidden_size=16, intermediate_size=160, num_attention_heads=2)
    tokens = np.random.default_rng(64).integers(0, 61, (16, 8)).astype(np.int32)
    calibration = CalibrationConfig(windows=16, window_length=8, budgets=(8.0,), threshold_windows=1)
    trainer = RouterTrainer(model=model, calibration=calibration, windows=tokens)

    def flat(router):
        """Scores every token of every slice far below its gain."""
        zeros = jax.tree.map(jnp.zeros_like, router)
        return dataclasses.replace(zeros, output_bias=jnp.full_like(router.output_bias, BELOW))

    routers = jax.tree.map(flat, routers_of(model.variables), is_leaf=lambda node: isinstance(node, Router))
    gradients = trainer._gradients

    def measure(bits, draws):
        found = [gradients(routers, model.variables, (tokens, np.float32(bits), np.uint32(n))) for n in range(draws)]
        biases = jax.tree.map(lambda *leaves: 1 - np.mean(leaves, axis=0), *found)  # mean(gain) / exp(BELOW)
        paths = (path.split("/") for path in model.config.linear_shapes())
        return np.exp(BELOW) * np.stack([biases[part][name]["router"].output_bias for part, name in paths], axis=1)

    return model, tokens, measure


def test_gains_predict_what_reading_one_linear_at_fewer_bits_costs(gains_of):
    """Against exact divergences, around the model at full depth; linears of all sizes on one scale."""
    model, tokens, measure = gains_of
    shapes = model.config.linear_shapes()
    layers, linears, slices = model.config.num_hidden_layers, len(shapes), 3
    full = jnp.full((layers, linears), slices)
    reference = jax.nn.log_softmax(forward_at(model, model.variables, tokens, full))
    cost = jax.jit(lambda table: kullback_leibler(reference, forward_at(model, model.variables, tokens, table)))
    places = itertools.product(range(layers), range(linears), (1, 2))
    exact = np.reshape([cost(full.at[i, n].set(depth)) for i, n, depth in places], (layers, linears, 2))

    sizes = np.array([rows * columns for rows, columns in shapes.values()])
    prices = 2 * (sizes / sizes.mean())[:, None]  # both slices have two bits
    removed = measure(8.0, 30) * prices
    predicted = np.stack([removed.sum(axis=-1), removed[..., 1]], axis=-1)  # depth 1 lacks both slices
    ratio = predicted / exact
    print(np.round(ratio, 2), np.exp(np.mean(np.log(ratio))))
    assert 0.5 < ratio.min() and ratio.max() < 1.5
    assert np.exp(np.mean(np.log(ratio))) == pytest.approx(1.0, abs=0.2)


def test_gains_are_those_of_the_model_at_the_depths_of_a_step(gains_of):
    measure = gains_of[2]
    assert np.abs(np.log(measure(4.0, 2) / measure(8.0, 2))).max() > 0.01
