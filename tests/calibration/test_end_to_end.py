"""End-to-end tuning: its loss against float64, its epochs against the quantizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.distillation import distillation_loss
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.linears import NestedLinear, UniformWidth, trainable
from mobiquant_jax.models import Llama

BUDGETS = (5.0, 6.0)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(40).integers(0, 61, (4, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def start(params, config, elastic):
    """Trainable parameters of the blocks, untrained."""
    keys = jax.random.split(jax.random.key(41), config.num_hidden_layers)
    return jax.vmap(lambda dense, key: trainable(dense, config, elastic, key))(params["layers"], keys)


@pytest.fixture(scope="module")
def make_tuner(config, elastic, recipe, windows):
    def make(generated=windows[:0], **changes):
        calibration = recipe(**(dict(end_epochs=6, end_weight_lr=1e-3, end_batch_size=1) | changes))
        return EndToEndTrainer(
            config=config, elastic=elastic, calibration=calibration, windows=windows, generated=generated
        )

    return make


@pytest.fixture(scope="module")
def tuner(make_tuner):
    return make_tuner()


@pytest.fixture(scope="module")
def tuned(tuner, start, params):
    """The states after each epoch."""
    state = tuner.init(jax.tree.map(jnp.copy, start))
    states = []
    for epoch in range(6):
        state, _, healthy = tuner.epoch(state, params, epoch)
        assert healthy
        states.append(jax.device_get(state))
    return states


def test_distillation_loss_is_the_divergence():
    rng = np.random.default_rng(42)
    student, teacher = (3 * rng.normal(size=(2, 5, 7)) for _ in range(2))

    def probabilities(logits):
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = probabilities(teacher), probabilities(student)
    expected = np.mean(np.sum(p * np.log(p / q), axis=-1))
    found = distillation_loss(jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(float(distillation_loss(jnp.asarray(teacher), jnp.asarray(teacher)))) < 1e-6


def test_tuning_brings_the_model_nearer_to_the_unquantized_one(tuned, start, params, config, elastic, windows):
    """Read at four bits."""
    student = Llama(config, linear=partial(NestedLinear, elastic=elastic))

    @jax.jit
    def divergence(trained):
        read = student.apply({"params": {**params, "layers": trained}}, windows, UniformWidth(width=jnp.int32(4)))
        return distillation_loss(read, Llama(config).apply({"params": params}, windows))

    before, after = (float(divergence(state)) for state in (start, tuned[5].params))
    assert after < 0.8 * before


def test_only_what_has_a_rate_moves(tuned, start, make_tuner, params):
    before, after = (params["mlp"]["up_proj"] for params in (start, tuned[5].params))
    assert np.abs(after["kernel"] - before["kernel"]).max() > 1e-3
    assert np.abs(after["clipping"].gamma - before["clipping"].gamma).max() > 1e-4
    jax.tree.map(np.testing.assert_array_equal, after["router"], before["router"])
    np.testing.assert_array_equal(tuned[5].params["mlp_norm"]["scale"], start["mlp_norm"]["scale"])
    frozen = make_tuner(end_weight_lr=0.0, end_clipping_lr=0.0)
    state, _, _ = frozen.epoch(frozen.init(jax.tree.map(jnp.copy, start)), params, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, start)


def test_an_epoch_is_determined_by_its_number(tuner, start, params, tuned):
    again, _, _ = tuner.epoch(tuner.init(jax.tree.map(jnp.copy, start)), params, 0)
    jax.tree.map(np.testing.assert_array_equal, again, tuned[0])
    different, _, _ = tuner.epoch(tuner.init(jax.tree.map(jnp.copy, start)), params, 1)
    kernel = different.params["mlp"]["up_proj"]["kernel"]
    assert np.any(np.asarray(kernel) != again.params["mlp"]["up_proj"]["kernel"])


def test_a_step_that_is_not_finite_is_left_out(tuner, start, params):
    poisoned = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    state, loss, healthy = tuner.epoch(tuner.init(jax.tree.map(jnp.copy, start)), poisoned, 0)
    assert not healthy and not np.isfinite(loss)
    jax.tree.map(np.testing.assert_array_equal, state.params, start)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 2), (1.0, 3)])
def test_an_epoch_holds_the_share_of_generated_windows(make_tuner, windows, share, expected):
    """Three generated windows are there, of tokens that the calibration text lacks."""
    generated = np.full((3, 16), 99, np.int32) + np.arange(3)[:, None]
    tuner = make_tuner(generated=generated, end_generated_share=share)
    drawn = tuner._draw_windows(np.random.default_rng(43))
    own = [row for row in drawn if row[0] >= 99]
    assert drawn.shape == windows.shape and len(own) == expected
    assert len({row.tobytes() for row in drawn}) == len(drawn)  # none twice


def test_the_shapes_to_compile_ahead_for_are_those_of_an_epoch(make_tuner, start, params, monkeypatch):
    tuner = make_tuner(end_batch_size=2)
    _, shapes = tuner.abstract_epoch
    given = []

    def epoch(*arguments):
        given.append(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), arguments))
        return arguments[0], np.zeros(2), True

    monkeypatch.setitem(vars(tuner), "_epoch", epoch)
    tuner.epoch(tuner.init(jax.tree.map(jnp.copy, start)), tuner.placement.put(params), 0)
    assert given == [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), shapes)]
