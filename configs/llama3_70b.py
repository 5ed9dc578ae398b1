"""LLaMA-3-70B on C4, with the calibration data of the paper: for a pod or a node of GPUs.

    python experiments/calibrate.py --config=configs/llama3_70b.py --config.model.source=DIR
    python experiments/aot_check.py --config=configs/llama3_70b.py --topology=v5p:2x2x2 --tp=8

Needs: DIR, a Hugging Face folder of ``meta-llama/Meta-Llama-3-70B`` (safetensors; after accepting its licence), and
accelerators: the weights alone take 141 GB in bfloat16. The text comes from the hub too; without network, give
``--config.data.source=file:PATH``. The second command needs no accelerator: it compiles for one.
Expect: one elastic checkpoint in ``runs/llama3_70b``. The shapes are tested but quality is not measured, since no LLaMA
weights were available; ``--config.model.weights=random`` tries the pipeline without them.
"""

from ml_collections import ConfigDict

from mobiquant_jax.default_config import default_config


def get_config() -> ConfigDict:
    """The config of LLaMA-3-70B with the paper's 128 windows of 2048 tokens."""
    config = default_config()
    config.run_dir = "runs/llama3_70b"

    config.model.architecture = dict(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )
    return config
