"""The model against transformers.LlamaForCausalLM, live and recorded, and against a real trained model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mobiquant_jax.models import Llama, LlamaConfig, inverse_frequencies

NAMES = [
    "multi_head_untied",
    "grouped_query_tied",
    "llama3_old_generation",
    "llama3_new_generation_tied",
    "wide_heads_odd_vocabulary",
]


def relative_difference(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.fixture
def built(reference, tree_from_state):
    def built(hf, seed):
        config = LlamaConfig.from_hf(hf)
        state = reference.random_state(hf, seed)
        return config, state, {"params": tree_from_state(state, config.num_hidden_layers)}

    return built


def test_every_case_is_tested(reference):
    assert list(reference.CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits(name, reference, built):
    hf = json.loads(str(reference.recorded[f"{name}/config"]))
    seed = NAMES.index(name)
    config, state, variables = built(hf, seed)
    drawn = state["model.embed_tokens.weight"].sum(dtype=np.float64)
    assert drawn == pytest.approx(reference.recorded[f"{name}/embedding_sum"]), "numpy draws other numbers: record anew"
    logits = jax.jit(Llama(config).apply)(variables, reference.random_tokens(hf, seed))
    assert logits.dtype == jnp.float32
    difference = relative_difference(logits[:, ::7], reference.recorded[f"{name}/logits"])
    print(f"{name}: largest relative difference from the recorded logits {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_live_logits(name, reference, built):
    pytest.importorskip("torch")
    hf = reference.CASES[name]
    seed = int(np.random.default_rng().integers(1000, 2**31))  # fresh weights every time; printed to repeat a failure
    config, state, variables = built(hf, seed)
    tokens = reference.random_tokens(hf, seed)
    want = reference.transformers_logits(hf, state, tokens)
    difference = relative_difference(jax.jit(Llama(config).apply)(variables, tokens), want)
    print(f"{name}, seed {seed}: largest relative difference from transformers {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["llama3_old_generation", "wide_heads_odd_vocabulary"])
def test_exported_config_gives_the_same_logits_in_transformers(name, reference, built):
    pytest.importorskip("torch")
    hf, seed = reference.CASES[name], 5
    config, state, variables = built(hf, seed)
    tokens = reference.random_tokens(hf, seed)
    want = reference.transformers_logits(config.to_hf(), state, tokens)
    assert relative_difference(jax.jit(Llama(config).apply)(variables, tokens), want) < 1e-4


@pytest.mark.parametrize("name", [n for n in NAMES if "llama3" in n])
def test_inverse_frequencies_are_those_of_transformers(name, reference):
    pytest.importorskip("torch")
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = reference.CASES[name]
    want = LlamaRotaryEmbedding(HFConfig(**hf)).inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(LlamaConfig.from_hf(hf)), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_theta": 1e4},
        {"rms_norm_eps": 1e-2},
        {"num_key_value_heads": 2, "num_attention_heads": 2, "head_dim": 16},
    ],
    ids=str,
)
def test_each_constant_shapes_the_logits(change, reference, built):
    """What the comparison above would not notice if the random models were too tame."""
    hf, seed = reference.CASES["llama3_old_generation"], 11
    config, state, variables = built(hf, seed)
    if "head_dim" in change:  # the same query width cut into other heads; keys and values of that width too
        attention = variables["params"]["layers"]["attention"]
        for name in ("k_proj", "v_proj"):
            attention[name]["kernel"] = np.concatenate([attention[name]["kernel"]] * 2, axis=2)
        config = dataclasses.replace(config, num_key_value_heads=4)
        change = change | {"num_key_value_heads": 2}
    tokens = reference.random_tokens(hf, seed)
    before = np.asarray(jax.jit(Llama(config).apply)(variables, tokens))
    after = jax.jit(Llama(dataclasses.replace(config, **change)).apply)(variables, tokens)
    assert relative_difference(after, before) > 1e-3


def test_stories260k_negative_log_likelihood(shared_data, tree_from_state):
    folder = shared_data / "stories260K"
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    params = tree_from_state(load_file(folder / "model.safetensors"), config.num_hidden_layers)
    windows = np.load(folder / "windows.npy").astype(np.int32)

    @jax.jit
    def token_losses(tokens):
        logits = Llama(config).apply({"params": params}, tokens)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)

    loss = np.mean([np.asarray(token_losses(batch), np.float64).mean() for batch in np.split(windows, 8)])
    print(f"stories260K: mean nll {loss:.6f}")
    assert loss == pytest.approx(1.42076, abs=5e-4)
