"""Which windows are seen at which budgets, and the widths that meet a budget on average."""

import numpy as np
import pytest

from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.calibration.samples import Samples, draw_widths, drawn_widths, spread_budgets

BUDGETS = (2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


@pytest.fixture(params=[(1, 12), (2, 18), (3, 6), (6, 12)], ids=str)
def samples(request):
    per_window, windows = request.param
    config = CalibrationConfig(
        windows=windows, budgets=BUDGETS, budgets_per_window=per_window, threshold_windows=1, batch_size=per_window
    )
    return config, Samples.create(config)


def test_every_budget_has_as_many_windows_and_every_window_as_many_budgets(samples):
    config, samples = samples
    assert samples.budgets == BUDGETS
    assert samples.per_budget == config.samples_per_budget
    by_budget = samples.window.reshape(len(BUDGETS), samples.per_budget)
    for row in by_budget:
        assert len(set(row)) == len(row)  # no window twice at a budget
    for window in range(config.windows):
        levels = set(np.nonzero((by_budget == window).any(axis=1))[0])
        runs = [{(start + i) % len(BUDGETS) for i in range(config.budgets_per_window)} for start in levels]
        assert levels in runs  # neighbouring budgets, the last beside the first
    assert np.all(np.diff(by_budget, axis=1) > 0)  # strided over the text


def test_steps_take_every_sample_once_and_mix_no_budgets(samples):
    config, samples = samples
    rng = np.random.default_rng()
    for ids, bits in (samples.steps(config.batch_size), samples.steps(config.batch_size, rng)):
        assert ids.shape == (len(samples.window) // config.batch_size, config.batch_size)
        assert (ids.dtype, bits.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(np.sort(ids.ravel()), np.arange(len(samples.window)))
        for row, budget in zip(ids, bits, strict=True):
            assert {BUDGETS[sample // samples.per_budget] for sample in row} == {budget}


def test_order_comes_from_the_generator_alone():
    config = CalibrationConfig(windows=48, budgets=BUDGETS, batch_size=2, threshold_windows=1)
    samples = Samples.create(config)
    in_order = samples.steps(2)
    np.testing.assert_array_equal(in_order[0].ravel(), np.arange(48))
    np.testing.assert_array_equal(in_order[1], np.repeat(BUDGETS, 4))
    first, again, other = (samples.steps(2, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.any(first[0] != other[0]) and np.any(first[1] != in_order[1])
    pairs = {tuple(sorted(row)) for row in first[0]}
    assert pairs != {(i, i + 1) for i in range(0, 48, 2)}  # shuffled within a budget too


@pytest.mark.parametrize("slice_bits", [(2, 2, 2, 2), (4, 2, 2), (1, 1, 2, 4), (4, 4)])
@pytest.mark.parametrize("budget", [2.0, 2.3, 3.0, 4.0, 5.5, 6.0, 7.9, 8.0])
def test_drawn_widths_average_to_the_budget(slice_bits, budget):
    budget = max(budget, slice_bits[0])
    draws = 20000
    reads = np.cumsum(slice_bits)
    drawn = draw_widths(np.full(draws, budget, np.float32), slice_bits, np.random.default_rng())
    lower, upper = reads[reads <= budget + 1e-6].max(), reads[reads >= budget - 1e-6].min()
    assert set(np.unique(drawn)) == {lower, upper}
    assert drawn.mean() == pytest.approx(budget, abs=5 * (upper - lower) / 2 / draws**0.5 + 1e-6)


@pytest.mark.parametrize("budgets", [(2.0, 8.0), (2.5,), (3.0, 4.0), (5.0, 6.0), (8.0,)])
@pytest.mark.parametrize("slice_bits", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (1, 3, 4)])
def test_the_widths_that_can_be_drawn_are_those_that_are(slice_bits, budgets):
    rng = np.random.default_rng()
    drawn = [draw_widths(np.full(200, bits, np.float32), slice_bits, rng) for bits in budgets]
    assert drawn_widths(budgets, slice_bits) == tuple(sorted({int(width) for width in np.concatenate(drawn)}))


def test_each_step_draws_for_its_own_budget():
    bits = np.tile(np.array([2.0, 5.0, 8.0], np.float32), 500)
    drawn = draw_widths(bits, (2, 2, 2, 2), np.random.default_rng(3)).reshape(-1, 3)
    assert drawn.dtype == np.int32
    assert np.all(drawn[:, 0] == 2) and np.all(drawn[:, 2] == 8)
    assert set(np.unique(drawn[:, 1])) == {4, 6}
    np.testing.assert_array_equal(drawn.ravel(), draw_widths(bits, (2, 2, 2, 2), np.random.default_rng(3)))


@pytest.mark.parametrize("steps", [1, 3, 4, 11])
def test_every_budget_comes_once_before_any_comes_again(steps):
    budgets = (2.0, 3.0, 4.0, 8.0)
    rng = np.random.default_rng()
    found = spread_budgets(budgets, steps, rng)
    assert found.shape == (steps,)
    for first in range(0, steps - 3, 4):
        assert sorted(found[first : first + 4]) == list(budgets)
    assert len(set(found[len(found) // 4 * 4 :])) == steps % 4
    firsts = {float(spread_budgets(budgets, 1, rng)[0]) for _ in range(100)}
    assert firsts == set(budgets)  # a short plan prefers none
