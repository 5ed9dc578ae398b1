"""Training of one block: what it minimizes, what it may change, and what it does when it goes wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockTrainer
from mobiquant_jax.calibration.config import Stage, stages
from mobiquant_jax.calibration.linears import pack_block, trainable
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticLinear
from mobiquant_jax.quant import widths
from mobiquant_jax.routing import BatchBudget, FixedThreshold, UniformDepth


@pytest.fixture(scope="module")
def runtime(config, elastic):
    """``(trained parameters, x, policy) -> (y, average bits [B, T])``: the packed block that a checkpoint holds."""
    block = Block(config, linear=partial(ElasticLinear, elastic=elastic))
    sizes = {path.split("/")[1]: rows * columns for path, (rows, columns) in config.linear_shapes().items()}

    @jax.jit
    def apply(params, x, policy):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        (y, _), state = block.apply(pack_block(params, config, elastic), x, positions, None, policy, mutable=["stats"])
        return y, {name: leaf["bits"][0] for part in state["stats"].values() for name, leaf in part.items()}

    def call(params, x, policy):
        y, bits = apply(params, x, policy)
        used = sum(sizes[name] * np.asarray(bits[name], np.float64) for name in sizes) / sum(sizes.values())
        return np.asarray(y, np.float64), used

    return call


@pytest.fixture(scope="module")
def trainer(make_trainer, recipe):
    """The recipe ``elastic``, its programs compiled once for all tests."""
    return make_trainer(recipe(epochs=6, windows=8, weight_lr=3e-4))


@pytest.fixture(scope="module")
def inputs(trainer, dense, streams):
    return streams(trainer, dense)


def groups_changed(before, after):
    """The kinds of parameters in which two trees differ."""
    changed = set()
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        name = jax.tree_util.keystr(path)
        kind = next(kind for kind in ("kernel", "clipping", "router", "norm") if kind in name)
        changed |= {kind} if np.any(np.asarray(old) != np.asarray(new)) else set()
    return changed


def start(trainer, dense, index=0):
    """The parameters that training starts from."""
    key = jax.random.fold_in(jax.random.key(trainer.calibration.seed), index)
    return jax.jit(partial(trainable, config=trainer.config, elastic=trainer.elastic))(dense, key=key)


@pytest.fixture
def scripted(monkeypatch):
    """A function that has a block's error be what a list says, and returns the parameters it was asked about."""

    def script(errors):
        asked, remaining = [], list(errors)

        def evaluate(self, params, streams):
            asked.append(jax.tree.map(np.array, params))
            return remaining.pop(0), 5.0

        monkeypatch.setattr(BlockTrainer, "_evaluate", evaluate)
        return asked

    return script


def test_training_lowers_the_error_and_reports_it(trainer, inputs, dense, runtime):
    seen = []
    params, report = trainer.train(dense, *inputs, 0, lambda *epoch: seen.append(epoch))
    assert [epoch[:3] for epoch in seen] == [("nested", epoch, 6) for epoch in range(1, 7)]
    assert report.note == "" and report.after == min(report.before, *(epoch[3] for epoch in seen))
    assert report.after < 0.75 * report.before

    def measured(params, which=0):
        """The report's error, on the packed block: geometric mean over depths, on the first window of a budget near."""
        quantized, target = inputs
        errors, bits = [], []
        for depth, width in enumerate(widths(trainer.elastic.slice_bits), start=1):
            level = min(range(2), key=lambda level: abs(trainer.samples.budgets[level] - width))
            sample = level * trainer.samples.per_budget + which
            y, used = runtime(params, quantized[sample][None], UniformDepth(depth=jnp.array([depth])))
            y_star = np.asarray(target[trainer.samples.window[sample]], np.float64)
            errors.append(np.mean(np.sum((y[0] - y_star) ** 2, axis=-1) / np.sum(y_star**2, axis=-1)))
            bits.append(np.mean(used))
        return np.exp(np.mean(np.log(errors))), np.mean(bits)

    untrained = start(trainer, dense)
    assert measured(untrained)[0] == pytest.approx(report.before, rel=2e-2)
    error, bits = measured(params)
    assert error == pytest.approx(report.after, rel=2e-2)
    assert bits == report.bits == 6.0
    for other in range(1, trainer.samples.per_budget):  # windows that training saw and the report did not
        assert measured(params, other)[0] < 0.85 * measured(untrained, other)[0]


@pytest.mark.parametrize(
    ("changes", "samples", "bits"),
    [
        (dict(budgets=(5.0, 6.0)), [0, 2], [4, 8]),
        (dict(budgets=(4.0,)), [0], [4]),  # nothing is trained at 8 bits
        (dict(budgets=(8.0, 4.0)), [2, 0], [4, 8]),
        (dict(budgets=(5.0, 6.0), recipe="paper"), [0, 2], [5, 6]),
    ],
)
def test_a_block_is_evaluated_where_it_trains(make_trainer, recipe, changes, samples, bits):
    found, at = make_trainer(recipe(**changes))._evaluated
    np.testing.assert_array_equal(found, np.array(samples)[:, None])
    np.testing.assert_array_equal(at, bits)


def test_the_block_and_the_seed_determine_everything(trainer, inputs, dense, scripted):
    runs = []
    for index in (1, 1, 2):
        scripted([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
        runs.append(trainer.train(dense, *inputs, index)[0])
    first, again, other = runs
    for leaf, same in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, same)
    assert groups_changed(first, other) == {"kernel", "clipping", "router"}


def test_weights_and_clipping_are_trained_and_the_last_best_comes_back(trainer, inputs, dense, scripted):
    asked = scripted([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.6])
    params, report = trainer.train(dense, *inputs, 0)
    untrained, middle, best = asked[0], asked[3], asked[5]
    assert groups_changed(start(trainer, dense), untrained) == set()
    assert groups_changed(untrained, middle) == groups_changed(middle, best) == {"kernel", "clipping"}
    assert groups_changed(params, best) == set()
    assert (report.before, report.after, report.note) == (1.0, 0.5, "")


def test_the_paper_trains_clipping_then_routers_too_and_meets_the_budget(
    make_trainer, recipe, dense, streams, scripted, runtime
):
    """At threshold 0 the untrained routers read 6 bits; the penalty pulls them to the one budget, 4.5."""
    epochs = 92
    paper = recipe(recipe="paper", budgets=(4.5,), epochs=epochs, joint_epochs=epochs - 1, router_lr=0.1, penalty=100.0)
    trainer = make_trainer(paper)
    quantized, target = streams(trainer, dense)
    asked = scripted([1.0 - 0.001 * epoch for epoch in range(epochs)] + [1.0])
    seen = []
    params, report = trainer.train(dense, quantized, target, 0, lambda *epoch: seen.append(epoch[:3]))
    assert seen == [("first slice", 1, 1)] + [("joint", epoch, epochs - 1) for epoch in range(1, epochs)]
    assert report.note == "" and report.after == 1.0 - 0.001 * (epochs - 1)
    assert groups_changed(start(trainer, dense), asked[0]) == set()
    assert groups_changed(asked[0], asked[1]) == {"clipping"}
    assert groups_changed(asked[1], params) == {"clipping", "router"}
    assert groups_changed(params, asked[-2]) == set()  # the last best, not the last
    before, after = (
        np.mean([runtime(p, x[None], FixedThreshold(threshold=jnp.float32(0.0)))[1] for x in quantized])
        for p in (asked[1], params)
    )
    assert before > 5.3
    assert after == pytest.approx(4.5, abs=0.4)


def test_a_loss_that_is_not_a_number_ends_training_at_the_best_step(trainer, inputs, dense, monkeypatch):
    epoch_fn, epochs = BlockTrainer.epoch_fn, []

    def poisoned(self, stage):
        def epoch(params, state, dense, streams, plan):
            epochs.append(stage.name)
            quantized, target, window = streams
            if len(epochs) == 3:  # one number of one window: the other steps of the epoch are healthy
                with jax.transfer_guard("allow"):
                    target = target.at[2, 3, 4].set(jnp.nan)
            return epoch_fn(self, stage)(params, state, dense, (quantized, target, window), plan)

        return epoch

    monkeypatch.setattr(BlockTrainer, "epoch_fn", poisoned)
    seen = []
    params, report = trainer.train(dense, *inputs, 0, lambda *epoch: seen.append(epoch))
    assert report.note == "non-finite loss in epoch 3 of stage 'nested': kept the best step before it"
    assert epochs == ["nested"] * 3 and len(seen) == 3
    assert report.after == min(seen[0][3], seen[1][3]) < report.before
    window = jnp.asarray(trainer.samples.window)
    assert trainer._evaluate(params, (*inputs, window))[0] == report.after


def test_activations_that_are_not_numbers_leave_the_block_as_it_was(trainer, inputs, dense):
    quantized, target = inputs
    params, report = trainer.train(dense, quantized, target.at[:, 3, 2].set(jnp.nan), 0)
    assert report.note == "non-finite loss in epoch 1 of stage 'nested': kept the best step before it"
    assert np.isnan(report.before) and np.isnan(report.after)
    assert groups_changed(start(trainer, dense), params) == set()


def test_an_error_that_rises_ends_training_at_the_best_step(trainer, inputs, dense, scripted):
    asked = scripted([1.0, 0.5, 0.7, 0.76])
    params, report = trainer.train(dense, *inputs, 0)
    assert report.note == "error rose to 0.76 in epoch 3 of stage 'nested': kept the best step"
    assert (report.before, report.after) == (1.0, 0.5)
    assert len(asked) == 4 and groups_changed(params, asked[1]) == set()
    scripted([1.0, float("nan")])
    _, report = trainer.train(dense, *inputs, 0)
    assert report.note.startswith("non-finite loss in epoch 1") and report.after == 1.0


def test_nothing_comes_from_the_host_inside_an_epoch(trainer, inputs, dense, monkeypatch):
    def careless(self, stage):
        return lambda params, state, dense, streams, plan: (params, state, streams[0][0, 0, 0] + np.float32(1) > 0)

    monkeypatch.setattr(BlockTrainer, "epoch_fn", careless)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        trainer.train(dense, *inputs, 0)


@pytest.mark.parametrize(
    ("routing", "loss", "scalar", "policy"),
    [
        ("first_slice", "log_relative", 4.0, UniformDepth(depth=jnp.array([1]))),
        ("uniform", "relative", 8.0, UniformDepth(depth=jnp.array([2]))),
        ("penalty", "mse", 5.0, FixedThreshold(threshold=jnp.float32(0.0))),
    ],
)
def test_the_loss_of_every_stage(make_trainer, recipe, inputs, dense, runtime, routing, loss, scalar, policy):
    """Against float64 numpy on the outputs of the packed block and of the dense one."""
    weight, penalty, progress = 0.3, 0.7, 0.4
    trainer = make_trainer(recipe(loss=loss, propagated_weight=weight, penalty=penalty))
    params, x, target = start(trainer, dense), inputs[0][:1], inputs[1][:1]
    y, bits = runtime(params, x, policy)
    (follow, _) = jax.jit(Block(trainer.config).apply)({"params": dense}, x, jnp.arange(x.shape[1])[None])

    def term(target):
        target = np.asarray(target, np.float64)
        squared = (y - target) ** 2
        error = squared.mean() if loss == "mse" else (squared.sum(-1) / (target**2).sum(-1)).mean()
        return np.log(error) if loss == "log_relative" else error

    want = term(target) + weight * term(follow)
    if routing == "penalty":
        want += penalty * (bits.mean() - (8 + (scalar - 8) * progress / 0.8)) ** 2
    stage = Stage(name="", epochs=1, routing=routing, clipping_lr=0.0)
    step_loss = jax.jit(trainer.functions.loss(stage))
    got = step_loss(params, dense, (x, target), jnp.float32(scalar), jnp.float32(progress))
    assert got == pytest.approx(want, rel=2e-3)


def test_an_epoch_trains_each_stage_at_its_own_depths(make_trainer, recipe):
    rng = np.random.default_rng(5)
    for name, wanted in (("paper", [{4.0}, {5.0, 6.0}]), ("elastic", [{4.0, 8.0}])):
        trainer = make_trainer(recipe(recipe=name, windows=16))
        for stage, scalars in zip(stages(trainer.calibration), wanted, strict=True):
            plans = [trainer._epoch_plan(stage, rng) for _ in range(4)]
            assert set(np.concatenate([plan[1] for plan in plans]).tolist()) == scalars
            assert all(sorted(plan[0].ravel().tolist()) == list(range(16)) for plan in plans)


def test_the_quantized_stream_runs_each_step_at_its_budget(trainer, inputs, dense, runtime):
    quantized, _ = inputs
    params = start(trainer, dense)
    got = np.asarray(trainer.packed_block(trainer.pack(params), quantized + 0))  # the block donates its input
    for sample, budget in enumerate([5.0] * 4 + [6.0] * 4):
        want, bits = runtime(params, quantized[sample][None], BatchBudget(bits=jnp.float32(budget)))
        np.testing.assert_allclose(got[sample], want[0], rtol=1e-4, atol=1e-4)
        assert bits.mean() == pytest.approx(budget, abs=4 / 16)  # to within one token of the window


def test_abstract_params_are_those_of_training(trainer, dense):
    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), start(trainer, dense))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trainer.abstract_trained) == wanted
