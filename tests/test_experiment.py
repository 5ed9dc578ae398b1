"""What a config names, loaded: the model and its windows, and each mistake in one sentence."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mobiquant_jax import experiment
from mobiquant_jax.default_config import default_config
from mobiquant_jax.experiment import (
    load_architecture,
    load_calibration,
    load_dense_model,
    load_elastic,
    load_windows,
)
from mobiquant_jax.io import load_dense


@pytest.fixture
def config(shared_data) -> ConfigDict:
    folder = shared_data / "stories260K"
    config = default_config()
    config.model.source = str(folder)
    config.model.architecture = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config.data.source = f"tokens:{folder}/windows.npy"
    config.calibration.windows, config.calibration.window_length = 3, 100
    config.evaluation.windows, config.evaluation.window_length = 2, 50
    return config


def assert_equal(found, wanted) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_the_model_is_that_of_the_source_dithered_if_asked_for(config, monkeypatch):
    found, params, _ = load_dense(config.model.source)
    plain = load_dense_model(config)
    assert (plain.config, plain.is_elastic) == (found, False)
    assert_equal(plain.variables["params"], params)

    def marked(params, config):
        return {"dithered": params, "for": config}

    monkeypatch.setattr(experiment, "dither", marked)  # 172 inputs are no multiple of its block
    assert_equal(load_dense_model(config).variables["params"], params)
    config.model.dither = True
    dithered = load_dense_model(config).variables["params"]
    assert dithered["for"] == found
    assert_equal(dithered["dithered"], params)


def test_random_weights_need_no_source(config):
    config.model.source, config.model.weights = "nowhere", "random"
    model = load_dense_model(config)
    assert model.config == load_architecture(config)
    assert model.variables["params"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (5, 64, 172)
    assert_equal(model.variables, load_dense_model(config).variables)


def test_windows_are_as_many_and_as_long_as_their_section_says(config):
    model = load_dense_model(config)
    calibration, heldout = (load_windows(config, model, split) for split in ("calibration", "heldout"))
    assert (calibration.shape, heldout.shape) == ((3, 100), (2, 50))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "none"}, "model.weights='none' is neither source nor random"),
        ({"architecture.head_dim": 16}, "describes: its head_dim is 8, not 16"),
        ({"architecture.num_key_value_heads": 2}, "describes: its num_key_value_heads is 4, not 2"),
        ({"architecture.vocab_size": 500}, "describes: its vocab_size is 512, not 500"),
    ],
)
def test_a_mistaken_model_is_named(config, changes: dict, message: str):
    config.model.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        load_dense_model(config)


def test_mistaken_windows_are_named(config):
    model = load_dense_model(config)
    config.calibration.windows = 10_000
    with pytest.raises(ValueError, match=r"\(calibration\) has \d+ windows of 100 tokens, not 10000"):
        load_windows(config, model, "calibration")
    config.evaluation.window_length = 513
    with pytest.raises(ValueError, match=r"window_length=513 \(heldout\) exceeds the model's context of 512 tokens"):
        load_windows(config, model, "heldout")


def test_lists_and_sections_reach_the_frozen_configs_as_tuples_and_dicts(config):
    config.quant.slice_bits = [2, 1, 1, 2, 2]
    config.calibration.budgets = [2.0, 4.0, 8.0]
    config.calibration.windows = 48
    assert load_elastic(config).slice_bits == (2, 1, 1, 2, 2)
    assert load_calibration(config).budgets == (2.0, 4.0, 8.0)
    config.model.architecture.rope_scaling = dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )
    assert load_architecture(config).rope_scaling.factor == 8.0
