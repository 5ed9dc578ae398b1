"""LLaMA-2-7B on C4, with the calibration data of the paper.

    python experiments/calibrate.py --config=configs/llama2_7b.py --config.model.source=DIR

Needs: DIR, a Hugging Face folder of ``meta-llama/Llama-2-7b-hf`` (safetensors; after accepting its licence), and
an accelerator, as the weights alone take 13.5 GB in bfloat16. The text comes from the hub too; without network, give
``--config.data.source=file:PATH``.
Expect: one elastic checkpoint in ``runs/llama2_7b``. The shapes are tested but quality is not measured, since no LLaMA
weights were available; ``--config.model.weights=random`` tries the pipeline without them.
"""

from ml_collections import ConfigDict

from mobiquant_jax.default_config import default_config


def get_config() -> ConfigDict:
    """The config of LLaMA-2-7B with the paper's 128 windows of 2048 tokens."""
    config = default_config()
    config.run_dir = "runs/llama2_7b"

    config.model.architecture = dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return config
