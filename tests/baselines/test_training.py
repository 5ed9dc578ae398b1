"""What the trained methods do, step by step, against their equations in float64."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import AutoRoundConfig, OmniQuantConfig, QATConfig, QuantSpec, autoround, omniquant, qat
from mobiquant_jax.baselines.grid import round_straight_through
from mobiquant_jax.baselines.kernels import get_kernels, with_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.settings import program, stack_settings
from mobiquant_jax.baselines.spec import BlockTask, block_forward, positions
from mobiquant_jax.baselines.training import epoch_order
from mobiquant_jax.models import Block

GROUP, TOP = 16, 3  # two bits
METHODS = {"omniquant": omniquant, "qat": qat, "autoround": autoround}
# Six steps of two windows, in two runs: one program a method serves all tests. Rates are drawn from what moves codes.
SETTINGS = {
    "omniquant": [OmniQuantConfig(epochs=2, batch_size=2, propagated_weight=3.0, clipping_lr=lr) for lr in (0.02, 0.2)],
    "qat": [
        QATConfig(epochs=2, batch_size=2, weight_lr=weight, scale_lr=scale)
        for weight, scale in ((1e-3, 2e-3), (4e-3, 5e-4))
    ],
    "autoround": [
        AutoRoundConfig(steps=6, batch_size=2, rounding_rate=rounding, clipping_rate=clipping)
        for rounding, clipping in ((0.5, 0.1), (0.2, 0.3))
    ],
}
ORDER = np.array([[0, 1], [2, 3], [4, 5], [1, 3], [5, 0], [4, 2]], np.int32)


@pytest.fixture(scope="module")
def make_task(spec: QuantSpec, block):
    """A function that makes a task of two runs, for a block whose quantized inputs are a little off."""
    rng = np.random.default_rng(1)
    full = jnp.asarray(rng.normal(size=(6, 20, spec.config.hidden_size)), jnp.float32)
    off = full + jnp.asarray(0.05 * rng.normal(size=full.shape), jnp.float32)
    target = block_forward(spec.config, block, full)

    def make(settings, seeds=(0, 1)) -> BlockTask:
        return BlockTask(
            dense=block,
            quantized=jnp.broadcast_to(off, (2, *off.shape)),
            target=target,
            settings=stack_settings(settings),
            rngs=tuple(np.random.default_rng(seed) for seed in seeds),
        )

    return make


def limits(kernel):
    groups = kernel.reshape(-1, GROUP, kernel.shape[1])
    return groups.min(1), groups.max(1)


def on_grid(kernel, scale, zero, offset=0.0):
    """The grid of all three papers; a weight outside the range has no gradient of its own."""
    steps = kernel.reshape(-1, GROUP, kernel.shape[1]) / scale[:, None]
    steps = steps + jnp.reshape(jnp.broadcast_to(offset, kernel.shape), steps.shape)
    codes = round_straight_through(steps) + zero[:, None]
    codes = jnp.where((codes < 0) | (codes > TOP), jax.lax.stop_gradient(jnp.clip(codes, 0, TOP)), codes)
    return (scale[:, None] * (codes - zero[:, None])).reshape(kernel.shape)


def omniquant_kernels(kernels, trained):
    def one(kernel, clipping):
        lo, hi = limits(kernel)
        lo, hi = jax.nn.sigmoid(clipping.beta) * lo, jax.nn.sigmoid(clipping.gamma) * hi
        scale = (hi - lo) / TOP
        return on_grid(kernel, scale, jax.lax.stop_gradient(jnp.round(-lo / scale)))

    return {path: one(kernel, trained[path]) for path, kernel in kernels.items()}


def qat_kernels(kernels, trained):
    zeros = jax.tree.map(round_straight_through, trained["zero"])
    return {path: on_grid(trained["weight"][path], trained["scale"][path], zeros[path]) for path in kernels}


def autoround_kernels(kernels, trained):
    def one(kernel, offset, high, low):
        lo, hi = limits(kernel)
        scale = (high * hi - low * lo) / TOP
        return on_grid(kernel, scale, round_straight_through(-low * lo / scale), offset)

    return jax.tree.map(one, kernels, trained["offset"], trained["high"], trained["low"])


WRITTEN_OUT = {
    "omniquant": jax.jit(omniquant_kernels),
    "qat": jax.jit(qat_kernels),
    "autoround": jax.jit(autoround_kernels),
}


@pytest.fixture(scope="module")
def slopes(spec, block):
    """``(trained, windows, targets, second targets) -> loss and gradient`` of each method, without the trainer."""

    def make(name: str):
        def loss(trained, x, target, own):
            fake = with_kernels(block, WRITTEN_OUT[name](get_kernels(block, spec.config), trained))
            fake |= trained.get("norm", {})
            y, _ = Block(spec.config).apply({"params": fake}, x, positions(x))
            return jnp.mean((y - target) ** 2) + SETTINGS[name][0].propagated_weight * jnp.mean((y - own) ** 2)

        return jax.jit(jax.value_and_grad(loss))

    return {name: make(name) for name in METHODS}


def learning_rate(settings, leaf: str, done: float) -> float:
    """The rate of a leaf when a share ``done`` of all steps is done."""
    if isinstance(settings, OmniQuantConfig):
        return settings.clipping_lr
    if isinstance(settings, QATConfig):
        peak = settings.scale_lr if leaf in ("scale", "zero") else settings.weight_lr
        return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
    return (settings.rounding_rate if leaf == "offset" else settings.clipping_rate) / settings.steps * (1 - done)


def reference(slope, spec: QuantSpec, task: BlockTask, settings, start, order=ORDER):
    """What is trained after 0, 1, ... steps, as leaves in float64, and the loss that each step saw.

    Adam (b1 0.9, b2 0.999, eps 1e-8) or, for AutoRound, steps of one size within the ranges. A loss that is not finite
    leaves all as it is, the schedule too.
    """
    named, tree = jax.tree_util.tree_flatten_with_path(start)
    names = [path[0].key for path, _ in named]
    state = [np.asarray(leaf, np.float64) for _, leaf in named]
    first, second, taken = [0.0] * len(state), [0.0] * len(state), 0
    inputs = task.quantized[0]
    own = block_forward(spec.config, task.dense, inputs)
    states, losses = [state], []
    for ids in order:
        trained = tree.unflatten([jnp.asarray(leaf, jnp.float32) for leaf in state])
        value, found = slope(trained, inputs[ids], task.target[ids], own[ids])
        losses.append(float(value))
        if math.isfinite(losses[-1]):
            rates = [learning_rate(settings, name, taken / len(order)) for name in names]
            taken += 1
            grads = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]
            first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
            second = [0.999 * v + 0.001 * g**2 for v, g in zip(second, grads, strict=True)]
            moves = [
                m / (1 - 0.9**taken) / (np.sqrt(v / (1 - 0.999**taken)) + 1e-8)
                for m, v in zip(first, second, strict=True)
            ]
            if isinstance(settings, AutoRoundConfig):
                moves = [np.sign(g) for g in grads]
            state = [leaf - rate * move for leaf, rate, move in zip(state, rates, moves, strict=True)]
            if isinstance(settings, AutoRoundConfig):
                ranges = [(-0.5, 0.5) if name == "offset" else (0.0, 1.0) for name in names]
                state = [np.clip(leaf, *limits) for leaf, limits in zip(state, ranges, strict=True)]
        states.append(state)
    return states, losses


def check_trained(found, wanted, start, settings) -> None:
    """Each leaf moved as it should, to a hundredth of its rate; a code between two may have fallen to either side."""
    named, _ = jax.tree_util.tree_flatten_with_path(start)
    for (path, before), after, goal in zip(named, jax.tree.leaves(found), wanted, strict=True):
        close = np.abs(np.asarray(after, np.float64) - goal) < 0.01 * learning_rate(settings, path[0].key, 0.0)
        assert close.mean() > 0.99, jax.tree_util.keystr(path)
        assert np.abs(goal - before).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("method", METHODS)
def test_training_follows_the_equations(method: str, spec, block, make_task, fits, slopes):
    kernels, settings = get_kernels(block, spec.config), SETTINGS[method]
    task = make_task(settings)
    start = METHODS[method].parametrization(spec).create(block, settings[0])
    blocks, trained = fits[method](task, np.stack([ORDER, ORDER[::-1]]))
    seen = []
    for run, order in enumerate((ORDER, ORDER[::-1])):
        states, losses = reference(slopes[method], spec, task, settings[run], start, order)
        seen.append(int(np.argmin(losses)) if method == "autoround" else len(order))
        mine = jax.tree.map(lambda leaf, run=run: leaf[run], trained)
        check_trained(mine, states[seen[-1]], start, settings[run])
        for path, kernel in WRITTEN_OUT[method](kernels, mine).items():
            made = get_kernels(blocks, spec.config)[path][run]
            assert np.mean(np.abs(made - kernel) < 1e-4) > 0.995, path
        for name in qat.NORMS:
            wanted = (mine["norm"] if method == "qat" else block)[name]["scale"]
            np.testing.assert_array_equal(blocks[name]["scale"][run], wanted)
    if method == "autoround":  # of its steps, the best is neither always the first it saw nor the last
        assert 0 < min(seen) < len(ORDER) - 1


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_are_not_finite_change_nothing(method: str, spec, block, make_task, fits, slopes):
    settings = SETTINGS[method]
    task = make_task(settings)
    task = replace(task, target=task.target.at[5, 3, 2].set(jnp.inf))  # a window of two of the six steps
    start = METHODS[method].parametrization(spec).create(block, settings[0])
    _, trained = fits[method](task, np.stack([ORDER, ORDER]))
    states, losses = reference(slopes[method], spec, task, settings[1], start)
    assert np.isfinite(losses).sum() == 4
    wanted = states[int(np.nanargmin(losses))] if method == "autoround" else states[-1]
    check_trained(jax.tree.map(lambda leaf: leaf[1], trained), wanted, start, settings[1])


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_rounding(method: str, spec, block):
    kernels = get_kernels(block, spec.config)
    start = METHODS[method].parametrization(spec).create(block, SETTINGS[method][0])
    for path, kernel in WRITTEN_OUT[method](kernels, start).items():
        keep = 1 / (1 + math.exp(-4)) if method == "omniquant" else 1.0
        groups = np.asarray(kernels[path], np.float64).reshape(-1, GROUP, kernel.shape[1])
        scale = keep * (groups.max(1, keepdims=True) - groups.min(1, keepdims=True)) / TOP
        zero = np.round(-keep * groups.min(1, keepdims=True) / scale)
        wanted = scale * (np.clip(np.round(groups / scale) + zero, 0, TOP) - zero)
        assert np.mean(np.abs(wanted.reshape(kernel.shape) - kernel) < 1e-5) > 0.995, path


@pytest.fixture(scope="module")
def outcomes(builders, make_task):
    """Each method's block in two runs of other settings and seeds."""
    return {name: builders[name](make_task(SETTINGS[name], seeds=(5, 6))) for name in METHODS}


def same(first, second, config) -> float:
    """The share of weights that are equal; one between two codes may fall to either side."""
    pairs = zip(get_kernels(first, config).values(), get_kernels(second, config).values(), strict=True)
    return float(np.mean(np.concatenate([np.ravel(np.abs(a - b) < 1e-5) for a, b in pairs])))


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_and_do_not_see_each_other(method: str, spec, builders, outcomes, make_task):
    def run(outcome, number: int):
        return jax.tree.map(lambda leaf: leaf[number], outcome.params)

    settings, outcome = SETTINGS[method], outcomes[method]
    again = builders[method](make_task(settings, seeds=(5, 6)))
    jax.tree.map(np.testing.assert_array_equal, again.params, outcome.params)
    moved = builders[method](make_task([settings[0], settings[0]], seeds=(8, 5)))
    assert same(run(moved, 1), run(outcome, 0), spec.config) > 0.995  # what it was beside another, in another place
    assert same(run(moved, 0), run(moved, 1), spec.config) < 0.9  # another seed
    assert same(run(outcome, 0), run(outcome, 1), spec.config) < 0.9


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_block_error_on_the_grid(method: str, spec, block, outcomes, make_task):
    task = make_task(SETTINGS[method])

    def error(params) -> float:
        return float(jnp.mean(jnp.square(block_forward(spec.config, params, task.quantized[0]) - task.target)))

    kernels = {path: round_to_nearest(kernel, GROUP, 2) for path, kernel in get_kernels(block, spec.config).items()}
    rounded = error(with_kernels(block, kernels))
    for run in (0, 1):
        trained = jax.tree.map(lambda leaf, run=run: leaf[run], outcomes[method].params)
        assert error(trained) < 0.9 * rounded
        for path, kernel in get_kernels(trained, spec.config).items():
            values = np.sort(np.asarray(kernel).reshape(-1, GROUP, kernel.shape[-1]), axis=1)
            assert (1 + np.sum(np.diff(values, axis=1) > 0, axis=1)).max() <= 4, path


def test_autoround_keeps_a_range_whose_weights_have_one_sign(spec, block):
    """Factors shrink towards 0; a range without 0 would turn inside out."""
    kernels = {path: 1 + jnp.abs(kernel) for path, kernel in get_kernels(block, spec.config).items()}
    positive = with_kernels(block, kernels)
    parametrization = autoround.parametrization(spec)
    trained = parametrization.create(positive, AutoRoundConfig())
    trained["high"] = jax.tree.map(lambda factor: 0.3 * factor, trained["high"])
    made = get_kernels(jax.jit(parametrization.materialize)(positive, trained), spec.config)
    for path, kernel in kernels.items():
        highest = 0.3 * np.asarray(kernel).reshape(-1, GROUP, kernel.shape[1]).max(1)
        np.testing.assert_allclose(made[path], highest.repeat(GROUP, axis=0), rtol=1e-5)


def test_every_epoch_takes_every_window_once():
    order = epoch_order(12, 3, 5, np.random.default_rng(0))
    assert order.shape == (20, 3)
    for epoch in order.reshape(5, 12):
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in order.reshape(5, 12)}) == 5
    with pytest.raises(ValueError, match="batch size 5 does not divide 12 windows"):
        epoch_order(12, 5, 1, np.random.default_rng(0))


def test_the_recipes_are_the_published_ones():
    assert OmniQuantConfig.recipe(3) == OmniQuantConfig(clipping_lr=1e-2, epochs=20, batch_size=1, loss="mse")
    assert OmniQuantConfig.recipe(2) == OmniQuantConfig(clipping_lr=1e-2, epochs=40, propagated_weight=1.0)
    for steps in (200, 1000):  # all steps together can just cross half a step of the grid
        settings = replace(AutoRoundConfig.recipe(2), steps=steps)
        total = sum(learning_rate(settings, "offset", step / steps) for step in range(steps))
        assert total == pytest.approx(0.5, rel=0.01)
    assert program(QATConfig(weight_lr=1.0)) == program(QATConfig()) != program(QATConfig(epochs=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QATConfig(weight_lr=-1e-4), "qat.weight_lr=-0.0001 must be at least 0"),
        (lambda: QATConfig(epochs=0), "qat.epochs=0 must be at least 1"),
        (lambda: OmniQuantConfig(loss="mae"), "omniquant.loss='mae' is none of mse"),
        (lambda: AutoRoundConfig(batch_size=0), "autoround.batch_size=0 must be at least 1"),
        (lambda: stack_settings([QATConfig(), QATConfig(epochs=3)]), "differ in more than numbers"),
        (lambda: stack_settings([]), "no settings to stack"),
    ],
)
def test_mistaken_settings_are_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_autoround_draws_no_more_windows_than_there_are(builders, make_task):
    with pytest.raises(ValueError, match="autoround.batch_size=8 exceeds the 6 windows"):
        builders["autoround"](make_task([AutoRoundConfig()] * 2))
