"""Tuning slices alone: what is final stays to the bit, what is finer comes nearer to the unquantized model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration.distillation import distillation_loss
from mobiquant_jax.calibration.end_to_end import EndToEndTrainer
from mobiquant_jax.calibration.linears import pack_block, trainable
from mobiquant_jax.calibration.optimizer import FINAL_RATE
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.quant import SlicedWeight, slice_codes, widths

EPOCHS = 4
FINAL = 4  # bits of a code
RATE = dict(epochs=EPOCHS, rate=1.0)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(70).integers(0, 61, (4, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def packed(params, config, elastic):
    """The packed blocks; the last bits of all codes are random, and some final bits one off, as tuning moves them."""
    rng = np.random.default_rng(73)

    def pack(dense, key):
        return pack_block(trainable(dense, config, elastic, key), config, elastic)

    def scramble(weight):
        codes = codes_of(weight).astype(np.int32)
        final = np.clip(codes // 16 + rng.choice([-1, 0, 1], codes.shape, p=[0.2, 0.6, 0.2]), 0, 15)
        scrambled = jnp.asarray(16 * final + rng.integers(16, size=codes.shape), jnp.uint8)
        return slices_of(scrambled, weight.scale, weight.zero)

    slices_of = jax.jit(jax.vmap(lambda *grid: slice_codes(*grid, elastic.slice_bits)))
    layers = jax.jit(jax.vmap(pack))(params["layers"], jax.random.split(jax.random.key(71), config.num_hidden_layers))
    return layers | {"slices": jax.tree.map(scramble, layers["slices"], is_leaf=is_weight)}


def common(elastic, config, calibration, windows):
    none = windows[:0]
    return dict(config=config, elastic=elastic, calibration=calibration, windows=windows, generated=none)


@pytest.fixture(scope="module")
def make_tuner(config, elastic, recipe, windows):
    def make(**changes):
        alone = dict(final_width=FINAL, reads=tuple(width for width in widths(elastic.slice_bits) if width > FINAL))
        return SliceTuner(**common(elastic, config, recipe(end_batch_size=1), windows), **(alone | RATE | changes))

    return make


@pytest.fixture(scope="module")
def tuned(make_tuner, packed, params):
    """The blocks' slices after training; nothing but positions has moved."""
    tuner = make_tuner()
    state = tuner.init(tuner.begin(packed, params["layers"]))
    for epoch in range(EPOCHS):
        state, _, healthy = tuner.epoch(state, params, epoch)
        assert healthy
    for part in ("attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], packed["params"][part])
    return tuner.slices(state.params)


def is_weight(node):
    return isinstance(node, SlicedWeight)


def weights(slices):
    leaves = jax.tree.leaves(slices, is_leaf=is_weight)
    assert len(leaves) == 7
    return leaves


def codes_of(weight):
    return np.asarray(_codes(weight))


def read(weight, width):
    return np.asarray(_read(weight, width))


_codes = jax.jit(jax.vmap(SlicedWeight.codes))
_read = jax.jit(jax.vmap(SlicedWeight.dequantize_width, (0, None)), static_argnums=1)


@pytest.fixture(scope="module")
def begun(make_tuner, packed, params):
    """The blocks' slices before training."""
    tuner = make_tuner()
    return tuner.slices(tuner.begin(packed, params["layers"]))


def test_it_starts_from_the_codes_nearest_to_the_unquantized_weights(begun, packed, params):
    """Against float64: of all codes with the final bits, the one whose bin lies nearest to the weight's position."""
    size = 2 ** (8 - FINAL)
    for part, linears in packed["slices"].items():
        for name, linear in linears.items():
            before = linear["weight"]
            kernel, scale, zero, codes = (
                np.asarray(array, np.float64)
                for array in (
                    params["layers"][part][name]["kernel"],
                    before.scale,
                    before.zero,
                    codes_of(before),
                )
            )
            rows = kernel.shape[1] // scale.shape[1]
            position = 64 * kernel / np.repeat(scale, rows, 1) + np.repeat(zero, rows, 1)
            expected = np.clip(np.floor(position), codes // size * size, codes // size * size + size - 1)
            found = codes_of(begun[part][name]["weight"])
            on_an_edge = np.abs(position - np.round(position)) < 1e-3  # where float32 may round to the other code
            np.testing.assert_array_equal(found[~on_an_edge], expected[~on_an_edge])
            assert on_an_edge.mean() < 0.02 and np.any(found != codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_only_reads_beyond_the_final_width_change(tuned, packed, width):
    moved = [
        np.any(read(after, width) != read(before, width))
        for after, before in zip(weights(tuned), weights(packed["slices"]), strict=True)
    ]
    assert all(moved) if width > FINAL else not any(moved)


def test_it_brings_full_depth_nearer_to_the_unquantized_model(begun, tuned, packed, params, config, elastic, windows):
    apply = jax.jit(Llama(config).apply)
    teacher = apply({"params": params}, windows)

    def divergence(slices, width):
        variables = {"params": {**params, "layers": packed["params"]}, "slices": {"layers": slices}}
        model = ElasticModel(config=config, elastic=elastic, variables=variables)
        return float(distillation_loss(apply({"params": model.dequantized_params(width)}, windows), teacher))

    start = divergence(begun, 8)
    assert start < 0.8 * divergence(packed["slices"], 8)
    assert divergence(tuned, 8) < 0.8 * start
    assert divergence(tuned, 4) == divergence(packed["slices"], 4)


def test_each_stage_draws_the_widths_that_are_its_own(make_tuner, config, elastic, recipe, windows):
    rng = np.random.default_rng(72)
    finer = make_tuner().draw_steps(rng)
    assert set(finer) == {width for width in widths(elastic.slice_bits) if width > FINAL}
    assert set(make_tuner(final_width=2, reads=(4,)).draw_steps(rng)) == {4}

    def drawn(**changes):
        calibration = recipe(budgets=(4.0, 8.0), end_batch_size=1, end_epochs=1, **changes)
        return set(EndToEndTrainer(**common(elastic, config, calibration, windows)).draw_steps(rng))

    assert drawn(fine_above=FINAL) == {4}
    assert drawn() == {4, 8}


def test_the_rate_decays_over_the_epochs_that_the_stage_has(make_tuner):
    tuner = make_tuner(epochs=3, rate=0.5)
    params = {"mlp": {"up_proj": {"position": jnp.zeros(3), "scale": jnp.zeros(3)}}}
    ones = jax.tree.map(jnp.ones_like, params)
    state, steps = tuner.optimizer.init(params), 3 * tuner.steps
    taken = []
    for _ in range(steps + 1):
        updates, state = tuner.optimizer.update(ones, state, params)
        taken.append(-updates["mlp"]["up_proj"]["position"])
        assert not np.any(updates["mlp"]["up_proj"]["scale"])
    np.testing.assert_allclose(taken[0], 0.5, rtol=1e-4)  # Adam's steps of a constant gradient are the rate's
    np.testing.assert_allclose(taken[-1], 0.5 * FINAL_RATE, rtol=1e-4)


def test_parts_of_the_stage_draw_windows_of_their_own(make_tuner, monkeypatch):
    drawn = set()

    def draw(self, rng):
        drawn.add(int(rng.integers(2**60)))
        raise KeyboardInterrupt

    monkeypatch.setattr(SliceTuner, "_draw_windows", draw)
    for width, index in ((2, 0), (2, 0), (2, 1), (3, 0)):
        with pytest.raises(KeyboardInterrupt):
            make_tuner(final_width=width).epoch(None, None, index)
    assert len(drawn) == 3


def test_a_step_that_is_not_finite_is_left_out(make_tuner, packed, params):
    tuner = make_tuner()
    poisoned = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    state, _, healthy = tuner.epoch(tuner.init(tuner.begin(packed, params["layers"])), poisoned, 0)
    assert not healthy
    jax.tree.map(np.testing.assert_array_equal, state.params, tuner.begin(packed, params["layers"]))
