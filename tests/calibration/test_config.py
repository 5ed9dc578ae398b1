"""Recipes: every mistake is named, and the stages are what the recipe says."""

import dataclasses

import pytest

from mobiquant_jax.calibration import CalibrationConfig
from mobiquant_jax.calibration.config import Stage, stages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(recipe="papper"), "calibration.recipe='papper' is none of elastic, paper"),
        (dict(loss="l1"), "calibration.loss='l1' is none of mse, relative, log_relative"),
        (dict(streams="disk"), "calibration.streams='disk' is none of device, host"),
        (dict(threshold_scope="layer"), "calibration.threshold_scope='layer' is none of linear, global"),
        (dict(budgets=()), "calibration.budgets must lie in [2, 8], got ()"),
        (dict(budgets=(2.0, 8.5)), "calibration.budgets must lie in [2, 8], got (2.0, 8.5)"),
        (dict(budgets=(1.0, 8.0)), "calibration.budgets must lie in [2, 8], got (1.0, 8.0)"),
        (dict(budgets=(float("nan"), 8.0)), "calibration.budgets must lie in [2, 8], got (nan, 8.0)"),
        (dict(budgets_per_window=0), "calibration.budgets_per_window=0 is outside 1..8"),
        (dict(budgets_per_window=9), "calibration.budgets_per_window=9 is outside 1..8"),
        (dict(windows=0), "calibration.windows=0 is no multiple of the 8 budgets"),
        (dict(windows=12), "calibration.windows=12 is no multiple of the 8 budgets"),
        (dict(batch_size=0), "calibration.batch_size=0 does not divide 16 windows a budget"),
        (dict(batch_size=3), "calibration.batch_size=3 does not divide 16 windows a budget"),
        (dict(window_length=1), "calibration.window_length=1 must be at least 2"),
        (dict(epochs=0), "calibration.epochs=0 must be at least 1"),
        (dict(epochs=-1, recipe="paper"), "calibration.epochs=-1 must be at least 1"),
        (dict(joint_epochs=-1), "calibration.joint_epochs=-1 must be finite and not negative"),
        (dict(joint_epochs=21, recipe="paper"), "calibration.joint_epochs=21 exceeds epochs=20"),
        (dict(end_epochs=-2), "calibration.end_epochs=-2 must be finite and not negative"),
        (dict(fit_epochs=-1), "calibration.fit_epochs=-1 must be finite and not negative"),
        (dict(recipe="paper", end_epochs=2), "calibration.end_epochs=2: the recipe 'paper' ends with the blocks"),
        (dict(routed_epochs=-1), "calibration.routed_epochs=-1 must be finite and not negative"),
        (dict(routed_weight_lr=float("inf")), "calibration.routed_weight_lr=inf must be finite and not negative"),
        (dict(routed_router_lr=-1.0), "calibration.routed_router_lr=-1.0 must be finite and not negative"),
        (
            dict(routed_epochs=2, end_batch_size=113),
            "calibration.end_batch_size=113: routed_epochs trains on 112 windows only",
        ),
        (dict(recipe="paper", routed_epochs=2), "calibration.routed_epochs=2: the recipe 'paper' ends with the blocks"),
        (
            dict(routed_epochs=2, threshold_scope="linear"),
            "calibration.threshold_scope='linear': routers that routed_epochs train share one threshold, 'global'",
        ),
        (dict(slice_epochs=2), "calibration.slice_epochs=2 needs end_epochs or routed_epochs"),
        (dict(slice_epochs=-1), "calibration.slice_epochs=-1 must be finite and not negative"),
        (dict(recipe="paper", slice_epochs=2), "calibration.slice_epochs=2: the recipe 'paper' ends with the blocks"),
        (dict(fine_epochs=-1), "calibration.fine_epochs=-1 must be finite and not negative"),
        (dict(recipe="paper", fine_above=4), "calibration.fine_above=4: the recipe 'paper' trains all slices together"),
        (dict(fine_epochs=2), "calibration.fine_epochs=2 needs fine_above below 8"),
        *(
            (
                dict(fine_tuned_attention=True, **alone),
                "calibration.fine_tuned_attention=True needs end_epochs or routed_epochs, and fine_above below 8",
            )
            for alone in (dict(fine_above=4), dict(end_epochs=1))
        ),
        (dict(fine_above=9), "calibration.fine_above=9 exceeds the 8 bits of a code"),
        (dict(scale_width=1), "calibration.scale_width=1 is neither 0 nor a width from 2 to 8"),
        (dict(recipe="paper", scale_width=3), "calibration.scale_width=3: the recipe 'paper' scales no channels"),
        (dict(end_generated_share=1.5), "calibration.end_generated_share=1.5 is outside 0..1"),
        (dict(end_generated_windows=-1), "calibration.end_generated_windows=-1 must be finite and not negative"),
        (dict(end_save_seconds=-1.0), "calibration.end_save_seconds=-1.0 must be finite and not negative"),
        (dict(dtype="float16"), "calibration.dtype='float16' is none of float32, bfloat16"),
        (dict(end_batch_size=0), "calibration.end_batch_size=0 is outside 1..128"),
        (dict(end_batch_size=129), "calibration.end_batch_size=129 is outside 1..128"),
        (dict(temperature=0.0), "calibration.temperature=0.0 must be positive"),
        (dict(temperature=float("nan")), "calibration.temperature=nan must be positive"),
        (
            dict(threshold_windows=0),
            "calibration.threshold_windows=0 is outside 1..127, beside fit_batch_size=1 of windows=128",
        ),
        (
            dict(threshold_windows=128),
            "calibration.threshold_windows=128 is outside 1..127, beside fit_batch_size=1 of windows=128",
        ),
        (dict(threshold_windows=129, recipe="paper"), "calibration.threshold_windows=129 is outside 1..128"),
        (dict(fit_batch_size=0), "calibration.fit_batch_size=0 must be at least 1"),
        (
            dict(fit_batch_size=113),
            "calibration.threshold_windows=16 is outside 1..15, beside fit_batch_size=113 of windows=128",
        ),
        *(
            ({name: -1e-3}, f"calibration.{name}=-0.001 must be finite and not negative")
            for name in (
                "weight_lr",
                "clipping_lr",
                "router_lr",
                "end_weight_lr",
                "end_clipping_lr",
                "slice_lr",
                "fine_lr",
                "fit_lr",
            )
        ),
        (dict(weight_lr=float("nan")), "calibration.weight_lr=nan must be finite and not negative"),
        (dict(penalty=-1.0), "calibration.penalty=-1.0 must be finite and not negative"),
        (dict(propagated_weight=-1.0), "calibration.propagated_weight=-1.0 must be finite and not negative"),
        (dict(seed=-1), "calibration.seed=-1 must be finite and not negative"),
    ],
)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        CalibrationConfig(**changes)
    assert str(error.value) == message


def test_budgets_below_the_first_slice_are_refused():
    config = CalibrationConfig(budgets=(3.0, 4.0, 8.0), windows=3, threshold_windows=2)
    config.check_slices((2, 2, 2, 2), (2, 3, 4, 8))
    config.check_slices((1, 1, 2, 4), (2, 3, 4, 8))
    with pytest.raises(
        ValueError, match=r"^calibration.budgets \(3.0, 4.0, 8.0\) start below the first slice's 4 bits$"
    ):
        config.check_slices((4, 4), (2, 3, 4, 8))


def test_the_finer_slices_refine_a_width_that_there_is():
    fine = CalibrationConfig(windows=24, budgets=(3.0, 4.0, 8.0), threshold_windows=1, fine_above=4, end_epochs=1)
    fine.check_slices((2, 2, 4), (2, 3, 4, 8))
    assert fine.tuned_budgets == (3.0, 4.0) and "calibration.end_batch_size" in fine.batches
    assert dataclasses.replace(fine, fine_above=8).tuned_budgets == (3.0, 4.0, 8.0)
    with pytest.raises(
        ValueError, match=r"^calibration.fine_above=4 is none of the widths \(2, 6\) that slices refine$"
    ):
        fine.check_slices((2, 4, 2), (2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"^calibration.budgets \(3.0, 4.0, 8.0\) are all above fine_above=2$"):
        dataclasses.replace(fine, fine_above=2).check_slices((2, 2, 4), (2, 3, 4, 8))


def test_routed_tuning_needs_slices_to_choose_from():
    routed = CalibrationConfig(windows=24, budgets=(2.0, 4.0, 8.0), threshold_windows=1, fine_above=4, routed_epochs=1)
    routed.check_slices((2, 2, 4), (2, 3, 4, 8))
    assert (routed.coarse_depth((2, 2, 4)), routed.coarse_depth((2, 1, 1, 4))) == (2, 3)
    assert "calibration.end_batch_size" in routed.batches
    with pytest.raises(
        ValueError, match=r"^router.budget_grid \(2, 4, 8\) has nothing between 2 and fine_above=4 bits"
    ):
        routed.check_slices((2, 2, 4), (2, 4, 8))
    with pytest.raises(ValueError, match=r"^router.budget_grid \(2, 3, 8\) lacks 4: routed_epochs needs all widths$"):
        routed.check_slices((2, 2, 4), (2, 3, 8))
    alone = dict(routed_epochs=0, end_epochs=1, slice_epochs=1)
    for name, changes in (("routed_epochs", {}), ("slice_epochs", alone)):
        with pytest.raises(ValueError, match=f"^calibration.fine_above=2: {name} needs two slices up to it$"):
            dataclasses.replace(routed, fine_above=2, **changes).check_slices((2, 2, 4), (2, 3, 4, 8))


def test_samples_per_budget():
    assert CalibrationConfig(windows=24, budgets_per_window=3, threshold_windows=1).samples_per_budget == 9


def test_stages_of_the_recipes():
    rates = dict(weight_lr=1.0, clipping_lr=2.0, router_lr=3.0)
    elastic = CalibrationConfig(epochs=9, joint_epochs=5, **rates)
    paper = dataclasses.replace(elastic, recipe="paper")
    assert stages(elastic) == (
        Stage(name="nested", epochs=9, routing="uniform", weight_lr=1.0, clipping_lr=2.0, router_lr=0.0),
    )
    assert stages(paper) == (
        Stage(name="first slice", epochs=4, routing="first_slice", weight_lr=0.0, clipping_lr=2.0, router_lr=0.0),
        Stage(name="joint", epochs=5, routing="penalty", weight_lr=0.0, clipping_lr=2.0, router_lr=3.0),
    )
    assert [stage.name for stage in stages(dataclasses.replace(paper, joint_epochs=9))] == ["joint"]
    assert [stage.name for stage in stages(dataclasses.replace(paper, joint_epochs=0))] == ["first slice"]
    assert stages(dataclasses.replace(elastic, epochs=3)) == (dataclasses.replace(stages(elastic)[0], epochs=3),)


def test_both_recipes_train_a_block_for_twenty_epochs_by_default():
    for recipe, epochs in (("elastic", [20]), ("paper", [10, 10])):
        assert [stage.epochs for stage in stages(CalibrationConfig(recipe=recipe))] == epochs
