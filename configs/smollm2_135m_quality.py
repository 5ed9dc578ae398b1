"""The dithered SmolLM2-135M, calibrated for longer, on a GPU.

    python experiments/calibrate.py --config=configs/smollm2_135m_quality.py --config.data.source=file:C4,VALID

Needs: the model of smollm2_135m.py, a GPU, and two text files: one to calibrate on, one to score.
Expect: one elastic checkpoint in ``runs/smollm2_135m_quality``, as in README's table of perplexities. On H200s, a seed
a card, calibration took 415 to 422 s, its programs compiled before, and 8.6 GB of a card.

Channels are scaled first. Only widths of up to 4 bits are trained end to end, four fifths on text that the model writes
itself: first all tokens of a step at one width, then weights and routers together (`calibration/routed_tuning.py`),
slices in tiers (`calibration/tiers.py`), and at last each slice alone (`calibration/slice_tuning.py`). The slices
beyond start from the unquantized weights, those of the attention from its tuned ones, and are tuned together.
"""

from pathlib import Path

from ml_collections import ConfigDict

from mobiquant_jax.config_flags import load_config


def get_config() -> ConfigDict:
    """The demo's model, dithered, with a longer recipe."""
    config = load_config(Path(__file__).with_name("smollm2_135m.py"))
    config.run_dir = "runs/smollm2_135m_quality"

    config.model.dither = True
    config.quant.slice_bits = (2, 1, 1, 2, 2)
    # Dense near the bits of a slice, where thresholds jump from one tier to the next. Up to 4 bits these are budgets
    # that routed tuning trains at, too.
    config.router.budget_grid = (2.0, 2.25, 2.5, 2.75, 2.9, 3.0, 3.1, 3.25, 3.5, 3.75, 3.9, 4.0, 4.1, 4.25, 4.5, 5.0)
    config.router.budget_grid += (5.5, 5.9, 6.0, 6.1, 6.5, 7.0, 7.5, 8.0)

    config.data.source = "file:c4.txt,valid.txt"
    config.calibration.windows = 128
    config.calibration.window_length = 2048
    config.calibration.budgets = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
    config.calibration.dtype = "bfloat16"
    config.calibration.scale_width = 3
    config.calibration.epochs = 2
    config.calibration.end_epochs = 20
    config.calibration.end_batch_size = 2
    config.calibration.end_weight_lr = 1.5e-4
    config.calibration.end_generated_windows = 3072
    config.calibration.end_generated_share = 0.8
    config.calibration.routed_epochs = 30
    config.calibration.routed_weight_lr = 1e-4
    config.calibration.routed_clipping_lr = 1e-3
    config.calibration.routed_router_lr = 6e-3
    config.calibration.slice_epochs = 16
    config.calibration.slice_lr = 0.002
    config.calibration.fine_epochs = 8
    config.calibration.fine_lr = 0.01
    config.calibration.fine_tuned_attention = True
    config.calibration.fit_epochs = 2
    config.calibration.fit_batch_size = 1
    config.calibration.threshold_windows = 16
    config.evaluation.windows = 32
    config.evaluation.window_length = 2048
    return config
