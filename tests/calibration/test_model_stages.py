"""The stages of the whole model: what each starts from, which windows it sees, and states that are damaged."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import BlockTrainer, model_stages
from mobiquant_jax.calibration.channel_scales import fold, stack_scales
from mobiquant_jax.calibration.distillation import Distiller
from mobiquant_jax.calibration.routed_tuning import RoutedTrainer
from mobiquant_jax.calibration.routers import RouterState, RouterTrainer, routers_of
from mobiquant_jax.calibration.run_dir import FINE, ROUTED, SLICE, TUNING
from mobiquant_jax.calibration.slice_tuning import SliceTuner
from mobiquant_jax.calibration.thresholds import collect_scores, shared_thresholds
from mobiquant_jax.calibration.tiers import GAP
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.routing import UniformDepth


@pytest.fixture(autouse=True)
def simple_streams(monkeypatch):
    """Streams that a block adds one to, or nothing: the real ones, of test_pipeline.py, compile for each recipe."""
    monkeypatch.setattr(BlockTrainer, "dense_block", lambda self, dense, stream: stream + 1)
    monkeypatch.setattr(BlockTrainer, "packed_block", lambda self, variables, stream: stream)


@pytest.mark.parametrize(
    ("stage", "epochs", "titles"),
    [
        (TUNING, dict(end_epochs=2), ["end to end"] * 2),
        (ROUTED, dict(routed_epochs=2), ["routed"] * 2),
        (f"{SLICE}/8", dict(end_epochs=1, slice_epochs=2), ["slice to 8 bits"] * 2),
        (FINE, dict(fine_above=4, fine_epochs=2), ["finer slices"] * 2),
        (FINE, dict(fine_above=4, end_epochs=1, fine_epochs=2), ["finer slices"] * 2),
    ],
)
def test_a_damaged_state_of_tuning_is_computed_again(
    recorder, calibrator, trained, recorded, params, windows, monkeypatch, stage, epochs, titles
):
    """The states of the stages before it are whole."""

    def epoch(self, state, dense, index):
        def move(path, leaf):
            return leaf + 1.0 if getattr(path[-1], "key", "") in ("position", "kernel") else leaf

        moved = jax.tree_util.tree_map_with_path(move, state.params)
        return dataclasses.replace(state, params=self.constrain(moved, state.params)), 0.5 + index, True

    monkeypatch.setattr(Distiller, "epoch", epoch)
    changes = dict(budgets=(4.0, 8.0), end_save_seconds=0.0, **epochs)
    first = calibrator("run", recorder(), **changes)
    wanted = first.calibrate(params, windows)
    largest = max((f for f in first.run.saved(stage, 2).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3])
    found = calibrator("run", observer := recorder(), **changes).calibrate(params, windows)
    assert [event[0] for event in observer.events[:4]] == ["start", "damaged", "tuned", "tuned"]
    assert [event[1] for event in observer.events[2:4]] == titles
    assert "bytes long, not" in observer.events[1][1]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(("end_epochs", "fine_epochs"), [(0, 1), (1, 1), (1, 0), (0, 0)])
def test_a_run_ends_with_the_finer_slices(
    recorder, calibrator, trained, recorded, params, windows, monkeypatch, end_epochs, fine_epochs
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
    without = calibrator("without", recorder(), **changes).calibrate(params, windows)
    found = calibrator("with", recorder(), fine_above=4, fine_epochs=fine_epochs, **changes).calibrate(params, windows)
    assert len(asked) == bool(end_epochs) + bool(end_epochs or fine_epochs)  # text is written where something reads it
    for part, name in (("mlp", "up_proj"), ("attention", "q_proj")):
        weight, other = (variables["slices"]["layers"][part][name]["weight"] for variables in (without, found))
        before, after = (np.asarray(jax.vmap(SlicedWeight.codes)(codes), np.int32) for codes in (weight, other))
        kernel = np.asarray(params["layers"][part][name]["kernel"], np.float64)
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
    recorder, calibrator, trained, recorded, params, windows, monkeypatch, elastic
):
    """The coarse ones one after the other, then the finer ones; an epoch moves every weight up by 40 codes.

    The finer ones of the attention start where its weights were left, with an epoch or without; those of the MLP from
    the unquantized weights.
    """
    stages, attention = [], []

    def epoch(self, state, dense, index):
        if isinstance(self, RoutedTrainer):
            return dataclasses.replace(state, params=moved_by_routed_tuning(state.params)), 0.5, True
        if isinstance(self, SliceTuner):
            before = np.asarray(state.params["mlp"]["up_proj"]["position"])
            given = np.asarray(state.params["attention"]["q_proj"]["position"])
            moved = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf + 40.0 if path[-1].key == "position" else leaf, state.params
            )
            state = dataclasses.replace(state, params=self.constrain(moved, state.params))
            after = np.asarray(state.params["mlp"]["up_proj"]["position"])
            stages.append(((self.final_width, self.reads, self.epochs, self.rate), before, after))
            attention.append((given, np.asarray(state.params["attention"]["q_proj"]["position"])))
        return state, 0.5, True

    monkeypatch.setattr(Distiller, "epoch", epoch)
    four = dataclasses.replace(elastic, slice_bits=(2, 2, 2, 2), budget_grid=(2.0, 4.0, 6.0, 8.0))
    changes = dict(budgets=(2.0, 6.0), fine_above=6, end_epochs=1, routed_epochs=1, fine_tuned_attention=True)

    def calibrated(name, **more):
        run = dataclasses.replace(calibrator(name, recorder(), **(changes | more)), elastic=four)
        variables = run.calibrate(params, windows)
        linear = variables["params"]["layers"]["mlp"]["up_proj"]["router"].output_bias[:, :2]
        slices = variables["slices"]["layers"]
        weight = slices["mlp"]["up_proj"]["weight"]
        return np.asarray(jax.vmap(SlicedWeight.codes)(weight), np.int32), np.asarray(linear), slices

    tuned, routers, slices = calibrated("without")

    def factor(part, name):
        read = np.asarray(jax.vmap(lambda weight: weight.dequantize(4))(slices[part][name]["weight"]))
        return np.median(read / np.asarray(params["layers"][part][name]["kernel"]))

    assert factor("attention", "q_proj") > 1.08 > factor("mlp", "up_proj")  # as far back as bins of 6 bits allow
    final, same_routers, _ = calibrated("with", slice_epochs=1, slice_lr=0.5, fine_epochs=2, fine_lr=0.25)
    plans, starts, ends = zip(*stages, strict=True)
    assert plans == ((2, (4, 6), 1, 8.0), (4, (6,), 1, 2.0), (6, (8,), 2, 0.25), (6, (8,), 2, 0.25))
    at = np.floor(np.stack(starts)).astype(np.int32)
    moved = np.floor(np.stack(ends)).astype(np.int32)
    np.testing.assert_array_equal(same_routers[:, 0], routers[:, 0])
    moved_by = same_routers[:, 1] - routers[:, 1]  # all alike: a tier begins elsewhere where the weights are others
    np.testing.assert_allclose(moved_by, np.full_like(moved_by, moved_by[0]), atol=1e-4)
    np.testing.assert_array_equal(at[0] // 4, tuned // 4)  # the last two bits of these are the finer slice's
    np.testing.assert_array_equal(moved[0], np.minimum(at[0] + 40, at[0] // 64 * 64 + 63))
    np.testing.assert_array_equal(at[1], np.clip(at[0], moved[0] // 16 * 16, moved[0] // 16 * 16 + 15))
    np.testing.assert_array_equal(moved[1], at[1] // 16 * 16 + 15)
    np.testing.assert_array_equal(at[2] // 4, moved[1] // 4)
    np.testing.assert_array_equal(final, moved[3])
    np.testing.assert_allclose(attention[2][0], attention[1][1], atol=2e-3)  # of 255; a weight and back
    calibrated("unless told", slice_epochs=1, slice_lr=0.5, fine_epochs=1, fine_tuned_attention=False)
    assert np.mean(np.abs(attention[-1][0] - attention[-2][1]) > 1) > 0.1  # where the unquantized weights lie
    assert np.any(moved[0] // 16 != at[0] // 16) and np.any(at[2] != moved[1])


def test_thresholds_are_recorded_on_windows_that_routers_were_not_fitted_to(
    recorder, calibrator, trained, recorded, params, windows, monkeypatch
):
    fitted, replaced = [], RouterTrainer.start

    def start(trainer, variables):
        fitted.append(trainer.windows)
        return replaced(trainer, variables)

    monkeypatch.setattr(RouterTrainer, "start", start)
    calibrator("run", recorder(), threshold_windows=1).calibrate(params, windows)
    parts = [[row.tobytes() for row in part] for part in (fitted[0], recorded[0])]
    assert [len(part) for part in parts] == [3, 1]
    assert sorted(parts[0] + parts[1]) == sorted(row.tobytes() for row in windows)  # each in one of the two


def test_finer_slices_of_scaled_channels_start_from_the_scaled_weights(
    recorder, calibrator, trained, recorded, params, windows
):
    changes = dict(budgets=(4.0, 8.0), scale_width=3, fine_above=4)
    run = calibrator("run", recorder(), **changes)
    weight = run.calibrate(params, windows)["slices"]["layers"]["mlp"]["down_proj"]["weight"]
    original = fold(params["layers"], stack_scales(run.run.load_scales()))["mlp"]["down_proj"]["kernel"]
    read = np.asarray(jax.vmap(lambda sliced: sliced.dequantize(2))(weight))
    step = np.repeat(np.asarray(weight.scale, np.float32), original.shape[1] // weight.scale.shape[1], axis=1) / 64
    unscaled = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"])
    near, other = (np.mean(np.abs(read - np.asarray(kernel)) < step) for kernel in (original, unscaled))
    assert near > 0.6 > 2 * other  # where the bins allow it: within a step of the 8-bit code


def test_routers_that_were_tuned_keep_their_scores_and_all_slices_lie_in_tiers(
    recorder, calibrator, trained, recorded, params, windows, monkeypatch
):
    """The first routers enter routed tuning with thresholds of their own; its routers leave the run."""
    seen = {"kept": [], "budgets": [], "fitted": [], "measured": []}

    def shift(tree, by):
        def move(path, leaf):
            return leaf + jnp.asarray(by) if getattr(path[-1], "name", "") == "output_bias" else leaf

        return jax.tree_util.tree_map_with_path(move, tree)

    def start(trainer, variables):
        """The third slice comes before the second in the first ones, and the fourth before both when it is fitted."""
        seen["kept"].append(trainer.kept)
        seen["budgets"].append(trainer._budgets)
        seen["fitted"].append(trainer.windows)
        routers = shift(routers_of(variables), [0.0, 0.0, 60.0] if trainer.kept else [3.0, 20.0, 0.0])
        return RouterState(routers=routers, optimizer=trainer._optimizer.init(routers))

    def measure(model, windows, budgets, depth):
        seen["measured"].append(windows)
        before = UniformDepth(depth=jnp.array([2]))
        scores = collect_scores(model, model.variables, jnp.asarray(windows), before).values()
        seen["gap"] = min(np.min(s[..., 0]) for s in scores), max(np.max(s[..., 1]) for s in scores)
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
    elastic = ElasticConfig(group_size=8, slice_bits=(2, 1, 1, 4), router_hidden_size=4, budget_grid=(2, 3, 4, 8))
    run = calibrator(
        "run", recorder(), budgets=(2.0, 4.0, 8.0, 8.0), fine_above=4, routed_epochs=1, end_save_seconds=0.0
    )
    run = dataclasses.replace(run, elastic=elastic)
    variables = run.calibrate(params, windows)

    assert seen["kept"] == [0, 2]
    assert seen["budgets"] == [(2.0, 4.0), (4.0, 8.0, 8.0)]
    held = {row.tobytes() for row in recorded[0]}
    assert {row.tobytes() for row in seen["measured"][0]} == held
    for others in (*seen["fitted"], seen["tuner"].windows):
        assert len(others) == 2 and held.isdisjoint(row.tobytes() for row in others)
    np.testing.assert_array_equal(seen["entered"], seen["scored"])
    pairs = seen["tuner"].pairs
    assert pairs[:, 0].tolist() == [2, 3, 4] and pairs[0, 1] == np.inf and pairs[2, 1] == -np.inf
    assert seen["gap"][0] - seen["gap"][1] == pytest.approx(GAP, abs=1e-3)
    assert pairs[1, 1] == pytest.approx(np.mean(seen["gap"]), abs=1e-3)

    router = variables["params"]["layers"]["mlp"]["up_proj"]["router"]
    np.testing.assert_array_equal(router.output_bias[:, 0], seen["entered"][:, 0] + 7)
    lowered = seen["entered"] + np.array([7, 7, 67]) - np.asarray(router.output_bias)
    assert lowered[0, 2] > 20
    np.testing.assert_allclose(lowered, np.tile(lowered[0], (len(lowered), 1)), rtol=1e-4, atol=1e-4)
    model = ElasticModel(config=run.config, elastic=elastic, variables=variables)
    scores_of = jax.jit(partial(collect_scores, model))
    for border in (1, 2):
        before = UniformDepth(depth=jnp.array([border + 1]))
        scores = scores_of(variables, jnp.asarray(recorded[0]), before).values()
        least, most = min(np.min(s[..., :border]) for s in scores), max(np.max(s[..., border]) for s in scores)
        assert least - most == pytest.approx(GAP, abs=1e-3)

    # A run that continues finds the thresholds, and after the last epoch needs no first routers.
    monkeypatch.setattr(BlockTrainer, "embed", None)  # nor a stream, since all blocks are there
    seen["kept"].clear()
    run.run.save_thresholds(pairs + 1)
    again = run.calibrate(params, windows)
    assert seen["kept"] == [] and len(seen["measured"]) == 1
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    shutil.rmtree(run.run.saved(ROUTED, 1))
    run.calibrate(params, windows)
    assert seen["kept"] == [0] and len(seen["measured"]) == 1
    np.testing.assert_array_equal(seen["tuner"].pairs, pairs + 1)

    monkeypatch.setattr(model_stages, "shift_below", lambda scores, border: jnp.nan)
    with pytest.raises(ValueError, match=r"^the routers' scores are not finite: those of slice 3 are nan too high$"):
        run.calibrate(params, windows)
