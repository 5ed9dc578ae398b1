"""What the trained methods do in one step and over many, against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import AutoRoundConfig, OmniQuantConfig, QATConfig, QuantSpec, autoround, omniquant, qat
from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import get_kernels, with_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.settings import program, stack_settings
from mobiquant_jax.baselines.spec import BlockTask, block_forward, positions
from mobiquant_jax.baselines.training import build_fit, epoch_order
from mobiquant_jax.models import Block

GROUP = 16
METHODS = {
    "omniquant": (omniquant, OmniQuantConfig),
    "qat": (qat, QATConfig),
    "autoround": (autoround, AutoRoundConfig),
}


@pytest.fixture
def spec(config) -> QuantSpec:
    return QuantSpec(config=config, bits=2, group_size=GROUP)


def make_task(spec: QuantSpec, block, settings, seeds=(0,)) -> BlockTask:
    """A block whose quantized inputs are a little off."""
    rng = np.random.default_rng(1)
    full = jnp.asarray(rng.normal(size=(4, 10, spec.config.hidden_size)), jnp.float32)
    off = full + jnp.asarray(0.05 * rng.normal(size=full.shape), jnp.float32)
    settings = settings if isinstance(settings, list) else [settings] * len(seeds)
    return BlockTask(
        dense=block,
        quantized=jnp.broadcast_to(off, (len(settings), *off.shape)),
        target=block_forward(spec.config, block, full),
        settings=stack_settings(settings),
        rngs=tuple(np.random.default_rng(seed) for seed in seeds),
    )


def error(spec: QuantSpec, params, task: BlockTask, run: int = 0) -> float:
    params = jax.tree.map(lambda leaf: leaf[run], params)
    return float(jnp.mean(jnp.square(block_forward(spec.config, params, task.quantized[run]) - task.target)))


def loss_gradient(spec: QuantSpec, block, materialize, trained, task: BlockTask, ids):
    """The gradient of the block error, written out with no help of the trainer."""

    def loss(trained):
        kernels = materialize(get_kernels(block, spec.config), trained)
        x = task.quantized[0][ids]
        y, _ = Block(spec.config).apply({"params": with_kernels(block, kernels)}, x, positions(x))
        return jnp.mean(jnp.square(y - task.target[ids]))

    return jax.grad(loss)(trained)


def one_step(module, spec, block, settings, ids):
    """What a method trains, before and after a single step on the windows ``ids``, and its gradient."""
    task = make_task(spec, block, settings)
    parametrization = dataclasses.replace(module.parametrization(spec), keep_best=False)
    start = parametrization.create(get_kernels(block, spec.config), settings)
    _, trained = build_fit(spec, parametrization)(task, np.array([[ids]], np.int32))
    gradient = loss_gradient(spec, block, parametrization.materialize, start, task, np.array(ids))
    return start, jax.tree.map(lambda leaf: leaf[0], trained), gradient


def test_a_step_of_autoround_moves_against_the_sign_of_the_gradient(spec, block):
    settings = AutoRoundConfig(rounding_lr=0.01, clipping_lr=0.003)
    start, trained, gradient = one_step(autoround, spec, block, settings, (0, 2))
    for name, rate in (("offset", 0.01), ("high", 0.003), ("low", 0.003)):
        wanted = jax.tree.map(lambda s, g, rate=rate: s - rate * jnp.sign(g), start[name], gradient[name])
        if name != "offset":
            wanted = jax.tree.map(lambda x: jnp.clip(x, 0, 1), wanted)  # factors start at 1, their upper limit
        same = jax.tree.map(lambda w, t: np.mean(np.abs(w - t) < 1e-6), wanted, trained[name])
        assert min(jax.tree.leaves(same)) > 0.98, name  # a vanishing gradient may have either sign in float32


def test_a_first_step_of_adam_is_the_rate_times_the_sign(spec, block):
    start, trained, gradient = one_step(omniquant, spec, block, OmniQuantConfig(clipping_lr=0.02), (1,))
    for path, before in start.items():
        for name in ("gamma", "beta"):
            slope = np.asarray(getattr(gradient[path], name), np.float64)
            wanted = np.asarray(getattr(before, name)) - 0.02 * slope / (np.abs(slope) + 1e-8)
            np.testing.assert_allclose(getattr(trained[path], name), wanted, atol=2e-3)
    settings = QATConfig(weight_lr=1e-3, scale_lr=2e-3)
    start, trained, gradient = one_step(qat, spec, block, settings, (3,))
    for name, rate in (("weight", 1e-3), ("scale", 2e-3), ("zero", 2e-3)):
        for path in start[name]:
            slope = np.asarray(gradient[name][path], np.float64)
            wanted = start[name][path] - rate * slope / (np.abs(slope) + 1e-8)
            close = np.abs(trained[name][path] - wanted) < 0.1 * rate
            assert close.mean() > 0.97, (name, path)


def test_before_any_step_the_kernels_are_those_of_rounding(spec, block):
    kernels = get_kernels(block, spec.config)
    for module, settings in METHODS.values():
        parametrization = module.parametrization(spec)
        made = parametrization.materialize(kernels, parametrization.create(kernels, settings()))
        for path, kernel in kernels.items():
            if module is omniquant:
                lo, hi = (x.reshape(-1, GROUP, kernel.shape[1]) for x in (kernel, kernel))
                keep = 1 / (1 + np.exp(-4.0))
                wanted = fake_quantize(kernel, keep * lo.min(1), keep * hi.max(1), 2)
            else:
                wanted = round_to_nearest(kernel, GROUP, 2)
            np.testing.assert_allclose(made[path], wanted, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_block_error_on_the_grid(method: str, spec, block):
    module, settings = METHODS[method]
    short = {"autoround": dict(steps=60, batch_size=2, rounding_lr=0.02, clipping_lr=0.02)}.get(method, dict(epochs=15))
    rates = {"qat": dict(weight_lr=2e-3, scale_lr=1e-3), "omniquant": dict(clipping_lr=0.05)}.get(method, {})
    task = make_task(spec, block, settings(**short, **rates))
    outcome = module.build(spec)(task)
    kernels = {path: round_to_nearest(kernel, GROUP, 2) for path, kernel in get_kernels(block, spec.config).items()}
    rounded = jax.tree.map(lambda leaf: leaf[None], with_kernels(block, kernels))
    assert error(spec, outcome.params, task) < 0.8 * error(spec, rounded, task)
    for kernel in get_kernels(outcome.params, spec.config).values():
        groups = np.asarray(kernel[0]).reshape(-1, GROUP, kernel.shape[-1])
        assert max(len(np.unique(groups[g, :, o])) for g in range(groups.shape[0]) for o in range(groups.shape[2])) <= 4


def test_autoround_stays_in_its_ranges_and_keeps_the_best_step(spec, block):
    settings = AutoRoundConfig(steps=30, batch_size=4, rounding_lr=0.2, clipping_lr=0.1)
    task = make_task(spec, block, settings)
    order = np.broadcast_to(np.arange(4, dtype=np.int32), (1, 30, 4))  # all windows each time: losses are comparable
    kept, trained = build_fit(spec, autoround.parametrization(spec))(task, order)
    last, _ = build_fit(spec, dataclasses.replace(autoround.parametrization(spec), keep_best=False))(task, order)
    assert all(float(jnp.max(jnp.abs(leaf))) <= 0.5 for leaf in jax.tree.leaves(trained["offset"]))
    assert all(
        0 <= float(jnp.min(leaf)) and float(jnp.max(leaf)) <= 1
        for leaf in jax.tree.leaves([trained["high"], trained["low"]])
    )
    assert error(spec, kept, task) <= error(spec, last, task) + 1e-7
    assert error(spec, last, task) > 1.02 * error(spec, kept, task)  # at this rate the last step is not the best


def test_runs_together_are_the_runs_alone(spec, block):
    settings = [QATConfig(weight_lr=rate, epochs=2) for rate in (1e-3, 4e-3)]
    assert program(settings[0]) == program(settings[1]) != program(QATConfig(epochs=3))
    together = qat.build(spec)(make_task(spec, block, settings, seeds=(5, 6)))
    for run, seed in enumerate((5, 6)):
        alone = qat.build(spec)(make_task(spec, block, [settings[run]], seeds=(seed,)))
        for path, kernel in get_kernels(alone.params, spec.config).items():
            found = get_kernels(together.params, spec.config)[path]
            # One weight between two codes may fall to the other side, where float32 sums in another order.
            assert np.mean(np.abs(found[run] - kernel[0]) < 1e-3) > 0.995, path
    first, second = (get_kernels(together.params, spec.config)["mlp/up_proj"][run] for run in (0, 1))
    assert np.mean(np.abs(first - second) > 1e-3) > 0.05


def test_the_propagated_target_pulls_towards_the_block_on_its_own_inputs(spec, block):
    settings = OmniQuantConfig(epochs=1, propagated_weight=3.0)
    task = make_task(spec, block, settings)
    parametrization = omniquant.parametrization(spec)
    start = parametrization.create(get_kernels(block, spec.config), settings)
    _, trained = build_fit(spec, parametrization)(task, np.array([[[2]]], np.int32))
    own = dataclasses.replace(task, target=block_forward(spec.config, block, task.quantized[0]))
    gradients = [loss_gradient(spec, block, parametrization.materialize, start, t, np.array([2])) for t in (task, own)]
    total = jax.tree.map(lambda a, b: a + 3.0 * b, *gradients)
    moved = jax.tree.map(lambda t, s: t[0] - s, trained, start)
    agree = jax.tree.map(lambda m, g: np.mean(np.sign(m) == -np.sign(g)), moved, total)
    assert min(jax.tree.leaves(agree)) > 0.97
    assert (
        min(jax.tree.leaves(jax.tree.map(lambda m, g: np.mean(np.sign(m) == -np.sign(g)), moved, gradients[0]))) < 0.97
    )


def test_every_epoch_takes_every_window_once():
    order = epoch_order(12, 3, 5, np.random.default_rng(0))
    assert order.shape == (20, 3)
    for epoch in order.reshape(5, 12):
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in order.reshape(5, 12)}) == 5
    with pytest.raises(ValueError, match="batch size 5 does not divide 12 windows"):
        epoch_order(12, 5, 1, np.random.default_rng(0))


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


def test_autoround_draws_no_more_windows_than_there_are(spec, block):
    with pytest.raises(ValueError, match="autoround.batch_size=8 exceeds the 4 windows"):
        autoround.build(spec)(make_task(spec, block, AutoRoundConfig()))
