"""The dithered SmolLM2-135M, calibrated as the paper does it: clipping and routers, block by block, weights frozen.

    python experiments/calibrate.py --config=configs/smollm2_135m_paper.py --config.data.source=file:C4,VALID

Needs: what smollm2_135m_quality.py needs, with which it shares model, data, budgets and evaluation.
Expect: one elastic checkpoint in ``runs/smollm2_135m_paper``. README has its perplexities beside the other recipe's.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mobiquant_jax.config_flags import load_config


def get_config() -> ConfigDict:
    """The quality config's model and data, with the paper's recipe."""
    config = load_config(Path(__file__).with_name("smollm2_135m_quality.py"))
    config.run_dir = "runs/smollm2_135m_paper"

    config.quant.slice_bits = (2, 2, 2, 2)
    config.calibration.recipe = "paper"
    config.calibration.scale_width = 0
    config.calibration.epochs = 20
    config.calibration.joint_epochs = 10
    config.calibration.end_epochs = 0
    config.calibration.routed_epochs = 0
    config.calibration.slice_epochs = 0
    config.calibration.fine_above = 8
    config.calibration.fine_epochs = 0
    config.calibration.fine_tuned_attention = False
    return config
