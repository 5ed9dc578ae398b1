"""Settings of a calibration that make no sense are refused by name and value."""

import pytest

from mobiquant_jax.calibration import CalibrationConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(recipe="papr"), "calibration.recipe='papr'"),
        (dict(budgets=(1.5, 3.0)), "must lie in"),
        (dict(windows=12), "calibration.windows=12 is no multiple of the 8 budgets"),
        (dict(batch_size=3), "calibration.batch_size=3 does not divide 16"),
        (dict(end_epochs=-1), "calibration.end_epochs=-1 must not be negative"),
        (dict(end_batch_size=0), "end_batch_size=0 must lie in 1..128"),
        (dict(end_batch_size=129), "end_batch_size=129 must lie in 1..128"),
        (dict(recipe="paper", end_epochs=2), "calibration.end_epochs=2: the recipe 'paper'"),
        (dict(weight_lr=-1e-4), "calibration.weight_lr=-0.0001"),
        (dict(end_router_lr=float("nan")), "calibration.end_router_lr=nan"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(change, message):
    with pytest.raises(ValueError) as error:
        CalibrationConfig(**change)
    assert message in str(error.value)


def test_the_bounds_themselves_are_accepted():
    assert CalibrationConfig(end_epochs=0, end_batch_size=128, weight_lr=0.0).end_batch_size == 128
    assert CalibrationConfig(recipe="paper").end_epochs == 0
