r"""A LLaMA of 260 thousand parameters that tells children's stories: the smallest real model, used by the tests.

    python experiments/calibrate.py --config=configs/stories260k.py \
        --config.model.source=DIR --config.data.source=tokens:IDS.npy

Needs: DIR, the stories260K weights of llama2.c as a Hugging Face folder (1 MB), and, since it has no tokenizer, the
token ids of stories in a .npy file.
Expect: two minutes on two CPU cores; checkpoint in ``runs/stories260k``.
"""

from ml_collections import ConfigDict

from mobiquant_jax.default_config import default_config


def get_config() -> ConfigDict:
    """The config of the tests' model."""
    config = default_config()
    config.run_dir = "runs/stories260k"

    config.model.architecture = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    config.quant.group_size = 4  # divides 64 and 172
    config.router.hidden_size = 8

    config.calibration.windows = 16
    config.calibration.window_length = 256
    config.calibration.threshold_windows = 4
    config.evaluation.windows = 16
    config.evaluation.window_length = 256
    config.evaluation.batch_size = 4
    return config
