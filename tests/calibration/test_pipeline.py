"""Calibration of a whole model: the two streams, what is written when, and how a run continues.

Training itself is tested in test_block.py and, in processes that are killed, in tests/experiments/test_calibrate.py;
here a block's parameters are a function of what it was given, so that any mistake in the streams shows.
"""

import dataclasses
import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockReport, BlockTrainer, Calibrator, RunDir, model_stages
from mobiquant_jax.calibration.channel_scales import fold, stack_scales
from mobiquant_jax.calibration.distillation import Distiller
from mobiquant_jax.calibration.linears import trainable
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.calibration.routers import RouterState, RouterTrainer, routers_of
from mobiquant_jax.calibration.run_dir import FINE, ROUTED, SLICE, TUNING
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.calibration.thresholds import collect_scores, shared_thresholds
from mobiquant_jax.calibration.tiers import GAP
from mobiquant_jax.io.checkpoint import abstract_variables
from mobiquant_jax.models import Block
from mobiquant_jax.models.elastic import ElasticConfig, ElasticLinear, ElasticModel
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import BatchBudget, Router, UniformDepth


class Recorder:
    """Notes what it is told; raises after a block if asked to."""

    def __init__(self, stop_after=None):
        self.stop_after, self.events = stop_after, []

    def on_start(self, blocks, resumed):
        self.events.append(("start", blocks, resumed))

    def on_epoch(self, block, stage, epoch, epochs, error):
        self.events.append(("epoch", block, stage))

    def on_block(self, block, report, seconds):
        self.events.append(("block", block, report.after))
        if block == self.stop_after:
            raise KeyboardInterrupt

    def on_damaged(self, reason):
        self.events.append(("damaged", reason))

    def on_generated(self, done, total):
        self.events.append(("generated", done, total))

    def on_tuned(self, *args):
        self.events.append(("tuned", *args))

    def on_fitted(self, epoch, epochs, healthy, seconds):
        self.events.append(("fitted", epoch, epochs, healthy))

    def on_budget(self, bits, left):
        self.events.append(("budget", bits))


@pytest.fixture
def trained(monkeypatch):
    """What each call of ``BlockTrainer.train`` was given, by block."""
    calls = {}

    def train(self, dense, quantized, target, index, on_epoch):
        calls[index] = jax.tree.map(np.array, (dense, quantized, target))
        on_epoch("nested", 1, 1, 0.5)
        params = trainable(dense, self.config, self.elastic, jax.random.key(index))
        shift = 1 + 0.01 * jnp.tanh(jnp.mean(quantized) + jnp.mean(target))
        params = jax.tree.map(lambda leaf: leaf * shift, params)
        return params, BlockReport(before=1.0, after=0.5 + index, bits=5.0, note="as told")

    monkeypatch.setattr(BlockTrainer, "train", train)
    monkeypatch.setattr(RouterTrainer, "start", start_routers)
    monkeypatch.setattr(RouterTrainer, "epoch", fit_routers)
    return calls


@pytest.fixture
def recorded(monkeypatch):
    """The windows of each call of ``record_thresholds``, which does nothing else."""
    calls = []

    def record(model, windows, *more):
        calls.append(windows)
        return model.variables

    monkeypatch.setattr(model_stages, "record_thresholds", record)
    return calls


def start_routers(trainer, variables):
    """A state with the routers as they are, in place of a program that takes seconds to compile."""
    routers = routers_of(variables)
    return RouterState(routers=routers, optimizer=trainer._optimizer.init(routers))


def fit_routers(trainer, state, variables, index):
    """Adds what tells the epoch and the windows from others, to all scores alike: a batch's own budget ignores it."""
    shift = (index + 1) * float(np.mean(trainer.windows))

    def shifted(router):
        return dataclasses.replace(router, output_bias=router.output_bias + shift)

    routers = jax.tree.map(shifted, state.routers, is_leaf=lambda node: isinstance(node, Router))
    return dataclasses.replace(state, routers=routers), True


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(60).integers(0, 61, (4, 16)).astype(np.int32)


@pytest.fixture
def calibrator(config, elastic, recipe, tmp_path):
    def make(name, observer, **changes):
        run = RunDir(path=tmp_path / name)
        run.path.mkdir(exist_ok=True)
        return Calibrator(config=config, elastic=elastic, calibration=recipe(**changes), run=run, observer=observer)

    return make


def test_the_streams_of_two_blocks_and_a_run_that_continues(
    calibrator, trained, params, windows, config, elastic, recipe
):
    observer = Recorder()
    whole = calibrator("whole", observer)
    variables = whole.calibrate(params, windows)
    assert observer.events == [
        ("start", 2, 0),
        ("epoch", 0, "nested"),
        ("block", 0, 0.5),
        ("epoch", 1, "nested"),
        ("block", 1, 1.5),
        ("fitted", 1, 2, True),
        ("fitted", 2, 2, True),
        *(("budget", bits) for bits in reversed(elastic.budget_grid)),
    ]
    rows = [json.loads(line) for line in (whole.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["block"], row["before"], row["after"], row["bits"], row["note"]) for row in rows[:2]] == [
        (0, 1.0, 0.5, 5.0, "as told"),
        (1, 1.0, 1.5, 5.0, "as told"),
    ]

    # The full-precision stream is the dense model's, whatever the quantized blocks do.
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))
    dense_block = jax.jit(lambda p, x: Block(config).apply({"params": p}, x, positions)[0])
    stream = np.asarray(params["embedder"]["embedding"])[windows]
    # Samples are ordered by budget: windows 0 and 2 at 5 bits, 1 and 3 at 6.
    quantized, budgets = stream[[0, 2, 1, 3]], [5.0, 5.0, 6.0, 6.0]
    elastic_block = Block(config, linear=partial(ElasticLinear, elastic=elastic))
    run_packed = jax.jit(lambda v, x, bits: elastic_block.apply(v, x, positions[:1], None, BatchBudget(bits=bits))[0])
    for index in range(2):
        dense, given, target = trained[index]
        want = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, dense, want)))
        stream = dense_block(want, stream)
        np.testing.assert_allclose(target, stream, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(given, quantized, rtol=1e-4, atol=1e-4)
        packed = jax.tree.map(
            lambda leaf, index=index: leaf[index],
            {
                name: variables[name]["layers"]  # thresholds are recorded by now; a batch's own budget ignores them
                for name in ("params", "slices", "routing")
            },
        )
        quantized = [run_packed(packed, x[None], bits)[0] for x, bits in zip(given, budgets, strict=True)]

    # What comes out is a checkpoint's tree: the trained blocks, and around them the model's own parts.
    wanted = abstract_variables(config, elastic)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), wanted
    )
    for part in ("embedder", "final_norm", "lm_head"):
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, variables["params"][part], params[part])))

    # A run that ends after block 0 keeps it, and the one that continues trains block 1 only, on the same numbers.
    first = dict(trained)
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        calibrator("cut", Recorder(stop_after=0)).calibrate(params, windows)
    assert list(trained) == [0]
    trained.clear()
    observer = Recorder()
    continued = calibrator("cut", observer).calibrate(params, windows)
    assert observer.events[:2] == [("start", 2, 1), ("epoch", 1, "nested")] and list(trained) == [1]
    for got, expected in zip(jax.tree.leaves(trained[1]), jax.tree.leaves(first[1]), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(jax.tree.leaves(continued), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_windows_and_sizes_that_do_not_fit_are_named_before_anything_is_written(
    calibrator, trained, params, windows, config
):
    for bad in (windows[:3], windows[:, :8]):
        with pytest.raises(ValueError) as error:
            calibrator("run", Recorder()).calibrate(params, bad)
        assert str(error.value) == f"windows {bad.shape} are not the recipe's (4, 16)"
    with pytest.raises(ValueError, match="start below the first slice's 4 bits"):
        calibrator("run", Recorder(), budgets=(3.0, 8.0)).calibrate(params, windows)
    assert not trained and not list(calibrator("run", Recorder()).run.path.iterdir())


def test_a_damaged_block_is_named_and_trained_again(calibrator, trained, recorded, params, windows):
    """One bit of the first block; the second one stays as it is."""
    with pytest.raises(KeyboardInterrupt):
        calibrator("run", Recorder(stop_after=1)).calibrate(params, windows)
    damaged = calibrator("run", observer := Recorder())
    files = (file for file in damaged.run.block(0).rglob("*") if file.is_file())
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    untouched = damaged.run.block(1).stat().st_mtime_ns
    largest.write_bytes(content)
    trained.clear()
    damaged.calibrate(params, windows)
    assert [event[:2] for event in observer.events[:4]] == [
        ("start", 2),
        ("damaged", observer.events[1][1]),
        ("epoch", 0),
        ("block", 0),
    ]
    name = largest.relative_to(damaged.run.block(0)).as_posix()
    message = (
        f"'{damaged.run.block(0)}' cannot be read as this model's variables: file '{name}' is not what was written"
    )
    assert observer.events[1][1].startswith(message) and "\n" not in observer.events[1][1]
    assert list(trained) == [0] and damaged.run.block(1).stat().st_mtime_ns == untouched


def test_a_full_disk_ends_the_run_with_what_was_saved(calibrator, trained, recorded, params, windows, monkeypatch):
    def full(path):
        return SimpleNamespace(free=0 if list(trained) == [0, 1] else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", full)
    run = calibrator("run", Recorder())
    with pytest.raises(OSError, match="no space left"):
        run.calibrate(params, windows)
    assert [entry.name for entry in run.run.blocks.iterdir()] == ["000"]
    assert len((run.run.path / "metrics.jsonl").read_text().splitlines()) == 1
    trained.clear()
    run.calibrate(params, windows)
    assert list(trained) == [1]


@pytest.mark.parametrize(
    ("stage", "epochs", "titles"),
    [
        (TUNING, dict(end_epochs=2), ["end to end"] * 2),
        (ROUTED, dict(routed_epochs=2), ["routed"] * 2),
        (f"{SLICE}/8", dict(end_epochs=1, slice_epochs=2), ["slice to 8 bits"] * 2),
        (FINE, dict(fine_above=4, fine_epochs=2), ["finer slices"] * 2),
    ],
)
def test_a_damaged_state_of_tuning_is_computed_again(
    calibrator, trained, recorded, params, windows, monkeypatch, stage, epochs, titles
):
    """The states of the stages before it are whole."""

    def epoch(self, state, dense, index):
        def move(path, leaf):
            return leaf + 1.0 if getattr(path[-1], "key", "") in ("position", "kernel") else leaf

        moved = jax.tree_util.tree_map_with_path(move, state.params)
        return dataclasses.replace(state, params=self.constrain(moved, state.params)), 0.5 + index, True

    monkeypatch.setattr(Distiller, "epoch", epoch)
    changes = dict(budgets=(4.0, 8.0), end_save_seconds=0.0, **epochs)
    first = calibrator("run", Recorder(), **changes)
    wanted = first.calibrate(params, windows)
    largest = max((f for f in first.run.saved(stage, 2).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    found = calibrator("run", observer := Recorder(), **changes).calibrate(params, windows)
    assert [event[0] for event in observer.events[:4]] == ["start", "damaged", "tuned", "tuned"]
    assert [event[1] for event in observer.events[2:4]] == titles
    assert "bytes long, not" in observer.events[1][1]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(("end_epochs", "fine_epochs"), [(0, 1), (1, 1), (1, 0), (0, 0)])
def test_a_run_ends_with_the_finer_slices(
    calibrator, trained, recorded, params, windows, monkeypatch, end_epochs, fine_epochs
):
    """On top of what tuning, or else the blocks, left; an epoch moves every weight up by three codes.

    They start from the unquantized weights where these lie in the bins that are final, else from the nearer end.
    """

    def epoch(self, state, dense, index):
        if isinstance(self, SliceTuner):
            moved = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf + 3.0 if path[-1].key == "position" else leaf, state.params
            )
            state = dataclasses.replace(state, params=self.constrain(moved, state.params))
        return state, 0.5, True

    monkeypatch.setattr(Distiller, "epoch", epoch)
    monkeypatch.setattr(
        model_stages, "write_windows", lambda config, params, windows, *_, **__: asked.append(1) or windows
    )
    asked = []
    changes = dict(budgets=(4.0, 8.0), end_epochs=end_epochs, end_generated_windows=4)
    without = calibrator("without", Recorder(), **changes).calibrate(params, windows)
    found = calibrator("with", Recorder(), fine_above=4, fine_epochs=fine_epochs, **changes).calibrate(params, windows)
    before, after = (
        np.asarray(jax.vmap(SlicedWeight.codes)(variables["slices"]["layers"]["mlp"]["up_proj"]["weight"]), np.int32)
        for variables in (without, found)
    )
    assert len(asked) == bool(end_epochs) + bool(end_epochs or fine_epochs)  # text is written where something reads it
    weight = without["slices"]["layers"]["mlp"]["up_proj"]["weight"]
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
    scale, zero = (
        np.repeat(np.asarray(limits, np.float64), kernel.shape[1] // limits.shape[1], axis=1)
        for limits in (weight.scale, weight.zero)
    )
    low = before // 16 * 16
    position = np.clip(np.clip(64 * kernel / scale + zero, low, low + 15.99) + 3 * fine_epochs, low, low + 15.99)
    from_edge = np.abs(position - np.round(position))
    unsure = (0 < from_edge) & (from_edge < 1e-3)  # float32 may round to the other code
    np.testing.assert_array_equal(after[~unsure], np.floor(position)[~unsure])
    assert np.mean(unsure) < 0.02 and np.any(after != before)


def moved_by_routed_tuning(params):
    """Every kernel by a tenth, and routers by what no other stage adds."""

    def move(path, leaf):
        if getattr(path[-1], "name", "") == "output_bias":
            return leaf + 3.0
        return 1.1 * leaf if getattr(path[-1], "key", "") == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(move, params)


def test_each_slice_is_tuned_alone_from_the_tuned_weights(
    calibrator, trained, recorded, params, windows, monkeypatch, elastic
):
    """The coarse ones one after the other, then the finer ones; an epoch moves every weight up by 40 codes."""
    stages = []

    def epoch(self, state, dense, index):
        if isinstance(self, RoutedTrainer):
            return dataclasses.replace(state, params=moved_by_routed_tuning(state.params)), 0.5, True
        if isinstance(self, SliceTuner):
            before = np.asarray(state.params["mlp"]["up_proj"]["position"])
            moved = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf + 40.0 if path[-1].key == "position" else leaf, state.params
            )
            state = dataclasses.replace(state, params=self.constrain(moved, state.params))
            after = np.asarray(state.params["mlp"]["up_proj"]["position"])
            stages.append(((self.final_width, self.reads, self.epochs, self.rate), before, after))
        return state, 0.5, True

    monkeypatch.setattr(Distiller, "epoch", epoch)
    four = dataclasses.replace(elastic, slice_bits=(2, 2, 2, 2), budget_grid=(2.0, 4.0, 6.0, 8.0))
    changes = dict(budgets=(2.0, 6.0), fine_above=6, end_epochs=1, routed_epochs=1)

    def calibrated(name, **more):
        run = dataclasses.replace(calibrator(name, Recorder(), **changes, **more), elastic=four)
        variables = run.calibrate(params, windows)
        linear = variables["params"]["layers"]["mlp"]["up_proj"]["router"].output_bias[:, :2]
        weight = variables["slices"]["layers"]["mlp"]["up_proj"]["weight"]
        return np.asarray(jax.vmap(SlicedWeight.codes)(weight), np.int32), np.asarray(linear)

    tuned, routers = calibrated("without")
    final, same_routers = calibrated("with", slice_epochs=1, slice_lr=0.5, fine_epochs=2, fine_lr=0.25)
    plans, starts, ends = zip(*stages, strict=True)
    assert plans == ((2, (4,), 1, 8.0), (4, (6,), 1, 2.0), (6, (8,), 2, 0.25), (6, (8,), 2, 0.25))
    at = np.floor(np.stack(starts)).astype(np.int32)
    moved = np.floor(np.stack(ends)).astype(np.int32)
    np.testing.assert_array_equal(same_routers, routers)
    np.testing.assert_array_equal(at[0] // 4, tuned // 4)  # the last two bits of these are the finer slice's
    np.testing.assert_array_equal(moved[0], np.minimum(at[0] + 40, at[0] // 64 * 64 + 63))
    np.testing.assert_array_equal(at[1], np.clip(at[0], moved[0] // 16 * 16, moved[0] // 16 * 16 + 15))
    np.testing.assert_array_equal(moved[1], at[1] // 16 * 16 + 15)
    np.testing.assert_array_equal(at[2] // 4, moved[1] // 4)
    np.testing.assert_array_equal(final, moved[3])
    assert np.any(moved[0] // 16 != at[0] // 16) and np.any(at[2] != moved[1])


def test_thresholds_are_recorded_on_windows_that_routers_were_not_fitted_to(
    calibrator, trained, recorded, params, windows, monkeypatch
):
    fitted = []

    def start(trainer, variables):
        fitted.append(trainer.windows)
        return start_routers(trainer, variables)

    monkeypatch.setattr(RouterTrainer, "start", start)
    calibrator("run", Recorder()).calibrate(params, windows)
    parts = [[row.tobytes() for row in part] for part in (fitted[0], recorded[0])]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(parts[0] + parts[1]) == sorted(row.tobytes() for row in windows)  # each in one of the two


def test_channels_are_scaled_before_blocks_train_and_a_run_continues_with_the_same_scales(
    calibrator, trained, recorded, params, windows
):
    first = calibrator("run", Recorder(stop_after=0), scale_width=3)
    with pytest.raises(KeyboardInterrupt):
        first.calibrate(params, windows)
    moved = [jax.tree.map(lambda leaf: 1.5 * leaf, first.run.load_scales()[0])]
    first.run.save_scales(moved)  # not what a search would find: what is there counts
    shutil.rmtree(first.run.blocks)
    second = calibrator("run", Recorder(), scale_width=3)
    variables = second.calibrate(params, windows)
    scales = second.run.load_scales()
    jax.tree.map(np.testing.assert_array_equal, scales[0], moved[0])
    found = fold(params["layers"], stack_scales(scales))
    for index, (dense, _, _) in sorted(trained.items()):
        expected = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), dense, expected)
    assert all(np.ptp(leaf) > 0.1 for leaf in scales[1])  # found, not 1
    targets = {index: target for index, (_, _, target) in trained.items()}
    plain = calibrator("plain", Recorder())
    plain.calibrate(params, windows)
    assert plain.run.load_scales() == []  # trained now holds what blocks without scales were given
    for index, (dense, _, _) in sorted(trained.items()):
        jax.tree.map(
            lambda leaf, all_, index=index: np.testing.assert_array_equal(leaf, all_[index]), dense, params["layers"]
        )
        # the blocks' function stays
        np.testing.assert_allclose(targets[index], trained[index][2], rtol=1e-4, atol=1e-5)
    norms = np.asarray(variables["params"]["layers"]["mlp_norm"]["scale"], np.float64)
    given = np.asarray(params["layers"]["mlp_norm"]["scale"])
    ratio = given / norms / np.stack([one.mlp_norm for one in scales])  # a block's stub scales all it is given alike
    assert np.ptp(ratio, axis=1).max() < 1e-5 * ratio.max()


def test_finer_slices_of_scaled_channels_start_from_the_scaled_weights(calibrator, trained, recorded, params, windows):
    changes = dict(budgets=(4.0, 8.0), scale_width=3, fine_above=4)
    run = calibrator("run", Recorder(), **changes)
    weight = run.calibrate(params, windows)["slices"]["layers"]["mlp"]["down_proj"]["weight"]
    original = fold(params["layers"], stack_scales(run.run.load_scales()))["mlp"]["down_proj"]["kernel"]
    read = np.asarray(jax.vmap(lambda sliced: sliced.dequantize(2))(weight))
    step = np.repeat(np.asarray(weight.scale, np.float32), original.shape[1] // weight.scale.shape[1], axis=1) / 64
    unscaled = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"])
    near, other = (np.mean(np.abs(read - np.asarray(kernel)) < step) for kernel in (original, unscaled))
    assert near > 0.6 > 2 * other  # where the bins allow it: within a step of the 8-bit code


def test_routers_that_were_tuned_keep_their_scores_and_finer_slices_come_after_them(
    calibrator, trained, recorded, params, windows, monkeypatch
):
    """The first routers enter routed tuning with thresholds of their own; its routers leave the run."""
    seen = {"kept": [], "budgets": [], "fitted": [], "measured": []}

    def shift(tree, by):
        def move(path, leaf):
            return leaf + jnp.asarray(by) if getattr(path[-1], "name", "") == "output_bias" else leaf

        return jax.tree_util.tree_map_with_path(move, tree)

    def start(trainer, variables):
        """The first ones score coarse slices higher; finer slices come before them when they are fitted."""
        seen["kept"].append(trainer.kept)
        seen["budgets"].append(trainer._budgets)
        seen["fitted"].append(trainer.windows)
        routers = shift(routers_of(variables), [0.0, 30.0] if trainer.kept else [3.0, 0.0])
        return RouterState(routers=routers, optimizer=trainer._optimizer.init(routers))

    def measure(model, windows, budgets, depth):
        seen["measured"].append(windows)
        seen["scored"] = np.asarray(routers_of(model.variables)["mlp"]["up_proj"]["router"].output_bias)
        return shared_thresholds(model, windows, budgets, depth)

    def epoch(self, state, dense, index):
        seen["tuner"] = self
        seen["entered"] = np.asarray(state.params["mlp"]["up_proj"]["router"].output_bias)
        return dataclasses.replace(state, params=shift(state.params, 7.0)), 0.5, True

    monkeypatch.setattr(RouterTrainer, "start", start)
    monkeypatch.setattr(RouterTrainer, "epoch", lambda trainer, state, variables, index: (state, True))
    monkeypatch.setattr(model_stages, "shared_thresholds", measure)
    monkeypatch.setattr(Distiller, "epoch", epoch)
    elastic = ElasticConfig(group_size=8, slice_bits=(2, 2, 4), router_hidden_size=4, budget_grid=(2, 3, 4, 8))
    run = calibrator(
        "run", Recorder(), budgets=(2.0, 4.0, 8.0, 8.0), fine_above=4, routed_epochs=1, end_save_seconds=0.0
    )
    run = dataclasses.replace(run, elastic=elastic)
    variables = run.calibrate(params, windows)

    assert seen["kept"] == [0, 1]
    assert seen["budgets"] == [(2.0, 4.0), (4.0, 8.0, 8.0)]
    held = {row.tobytes() for row in recorded[0]}
    assert {row.tobytes() for row in seen["measured"][0]} == held
    for others in (*seen["fitted"], seen["tuner"].windows):
        assert len(others) == 2 and held.isdisjoint(row.tobytes() for row in others)
    np.testing.assert_array_equal(seen["entered"], seen["scored"])
    pairs = seen["tuner"].pairs
    assert pairs[:, 0].tolist() == [2, 3, 4] and pairs[0, 1] == np.inf and pairs[2, 1] == -np.inf
    assert np.isfinite(pairs[1, 1])

    router = variables["params"]["layers"]["mlp"]["up_proj"]["router"]
    np.testing.assert_array_equal(router.output_bias[:, 0], seen["entered"][:, 0] + 7)
    lowered = seen["entered"][:, 1] + 37 - np.asarray(router.output_bias[:, 1])
    assert lowered[0] > 20
    np.testing.assert_allclose(lowered, np.full_like(lowered, lowered[0]), rtol=1e-4)
    model = ElasticModel(config=run.config, elastic=elastic, variables=variables)
    scores = collect_scores(model, variables, jnp.asarray(recorded[0]), UniformDepth(depth=jnp.array([2])))
    coarse, finer = (np.concatenate([np.ravel(s[..., index]) for s in scores.values()]) for index in (0, 1))
    assert np.min(coarse) - np.max(finer) == pytest.approx(GAP, abs=1e-3)

    # A run that continues finds the thresholds, and after the last epoch needs no first routers.
    seen["kept"].clear()
    run.run.save_thresholds(pairs + 1)
    again = run.calibrate(params, windows)
    assert seen["kept"] == [] and len(seen["measured"]) == 1
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    shutil.rmtree(run.run.saved(ROUTED, 1))
    run.calibrate(params, windows)
    assert seen["kept"] == [0] and len(seen["measured"]) == 1
    np.testing.assert_array_equal(seen["tuner"].pairs, pairs + 1)

    monkeypatch.setattr(model_stages, "shift_below", lambda scores, coarse: jnp.nan)
    with pytest.raises(
        ValueError, match=r"^the routers' scores are not finite: those of finer slices are nan nats too high$"
    ):
        run.calibrate(params, windows)


def test_activations_that_are_not_finite_are_named_and_leave_no_scales(calibrator, trained, params, windows):
    broken = params | {"embedder": jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), params["embedder"])}
    run = calibrator("run", Recorder(), scale_width=3)
    with pytest.raises(ValueError, match=r"^the unquantized model's activations in block 0 are not finite$"):
        run.calibrate(broken, windows)
    assert not trained and not run.run.scales.exists()
