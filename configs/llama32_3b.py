"""LLaMA-3.2-3B on C4, with the calibration data of the paper.

    python experiments/calibrate.py --config=configs/llama32_3b.py --config.model.source=DIR

Needs: DIR, a Hugging Face folder of ``meta-llama/Llama-3.2-3B`` (safetensors; after accepting its licence), and
an accelerator, as the weights alone take 6.4 GB in bfloat16. The text comes from the hub too; without network, give
``--config.data.source=file:PATH``.
Expect: one elastic checkpoint in ``runs/llama32_3b``. The shapes are tested but quality is not measured, since no LLaMA
weights were available; ``--config.model.weights=random`` tries the pipeline without them.
"""

from ml_collections import ConfigDict

from mobiquant_jax.default_config import default_config


def get_config() -> ConfigDict:
    """The config of LLaMA-3.2-3B with the paper's 128 windows of 2048 tokens."""
    config = default_config()
    config.run_dir = "runs/llama32_3b"

    config.model.architecture = dict(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=dict(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )
    return config
