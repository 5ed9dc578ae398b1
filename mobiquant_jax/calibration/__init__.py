"""Block-wise calibration of nested slices and routers."""

from mobiquant_jax.calibration.block import BlockReport, BlockTrainer
from mobiquant_jax.calibration.config import CalibrationConfig
from mobiquant_jax.calibration.console import ConsoleObserver
from mobiquant_jax.calibration.observer import Observer
from mobiquant_jax.calibration.pipeline import Calibrator
from mobiquant_jax.calibration.run_dir import RunDir, open_run
from mobiquant_jax.calibration.thresholds import record_thresholds

__all__ = [
    "BlockReport",
    "BlockTrainer",
    "CalibrationConfig",
    "Calibrator",
    "ConsoleObserver",
    "Observer",
    "RunDir",
    "open_run",
    "record_thresholds",
]
