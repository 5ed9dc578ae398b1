"""Operations counted by hand, and the devices whose peak is known."""

from types import SimpleNamespace

import pytest

from mobiquant_jax.calibration.config import CalibrationConfig, stages
from mobiquant_jax.calibration.flops import block_flops, epoch_flops, peak_flops


def test_a_block_by_hand(config):
    # D = 16, F = 24, one key-value head of 8 beside two query heads
    linears = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    attention = 2 * sum(2 * position * 2 * 8 for position in range(1, 11))  # two products with the keys seen so far
    assert block_flops(config, 10) == pytest.approx(2 * 10 * linears + attention, rel=0.02)
    assert block_flops(config, 10, slices=4) - block_flops(config, 10) == 3 * 2 * 10 * linears


def test_an_epoch_by_hand(config):
    (nested,), (first, joint) = (stages(CalibrationConfig(recipe=recipe)) for recipe in ("elastic", "paper"))
    sizes = dict(windows=6, length=10, slices=4)
    once = block_flops(config, 10)
    assert epoch_flops(config, nested, **sizes, follows=False) == 6 * 3 * once
    assert epoch_flops(config, first, **sizes, follows=False) == 6 * 3 * once
    assert epoch_flops(config, nested, **sizes, follows=True) == 6 * 4 * once
    assert epoch_flops(config, joint, **sizes, follows=False) == 6 * 3 * block_flops(config, 10, slices=4)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops([SimpleNamespace(device_kind=kind)] * 2) == (peak and 2 * peak)
