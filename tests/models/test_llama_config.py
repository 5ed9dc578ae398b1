"""LlamaConfig: both generations of config.json, the errors, and the sizes of known architectures."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from mobiquant_jax.models import Llama, LlamaConfig, RopeScaling

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL = SIZES | dict(num_key_value_heads=2, head_dim=8)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def config_json(**fields):
    return dict(model_type="llama", hidden_act="silu") | SIZES | fields


def test_both_generations_mean_the_same():
    old = config_json(rope_theta=5e5, rope_scaling={"rope_type": "llama3"} | SCALING, torch_dtype="bfloat16")
    new = config_json(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | SCALING, dtype="bfloat16")
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    assert LlamaConfig.from_hf(old).rope_scaling == RopeScaling(**SCALING)
    assert LlamaConfig.from_hf(old).rope_theta == 5e5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    ids=str,
)
def test_no_scaling(fields):
    config = LlamaConfig.from_hf(config_json(**fields))
    assert (config.rope_theta, config.rope_scaling) == (1e6 if fields else 1e4, None)


def test_the_type_key_of_early_files():
    config = LlamaConfig.from_hf(config_json(rope_scaling={"type": "llama3"} | SCALING))
    assert config.rope_scaling == RopeScaling(**SCALING)


@pytest.mark.parametrize(
    ("eos", "ids"), [(2, (2,)), ([5, 8, 9], (5, 8, 9)), (None, ()), ([], ())], ids=["int", "list", "null", "empty"]
)
def test_eos_token_ids(eos, ids):
    assert LlamaConfig.from_hf(config_json(eos_token_id=eos)).eos_token_ids == ids


def test_absent_fields_take_the_defaults_of_transformers():
    config = LlamaConfig.from_hf(config_json(num_key_value_heads=None))
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (2048, 1e-6, False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("eos", [(), (2,), (3, 4)])
def test_config_json_round_trip(scaled, eos):
    config = LlamaConfig(
        **SMALL | dict(head_dim=10), rope_scaling=RopeScaling(**SCALING) if scaled else None, eos_token_ids=eos
    )
    hf = json.loads(json.dumps(config.to_hf()))
    assert LlamaConfig.from_hf(hf) == config
    old = {name: value for name, value in hf.items() if name != "rope_parameters"}
    new = {name: value for name, value in hf.items() if name not in ("rope_theta", "rope_scaling")}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new) == config


def test_transformers_reads_the_exported_config():
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig(
        **SMALL | dict(head_dim=10, max_position_embeddings=16384),
        rope_theta=5e5,
        rope_scaling=RopeScaling(**SCALING),
        eos_token_ids=(3, 4),
    )
    hf = transformers.LlamaConfig(**config.to_hf())
    assert LlamaConfig.from_hf(hf.to_dict()) == config
    assert LlamaConfig.from_hf(transformers.LlamaConfig(**SIZES).to_dict()).num_key_value_heads == 4


def test_plain_dicts_are_accepted():
    config = LlamaConfig(**json.loads(json.dumps(SMALL | dict(rope_scaling=SCALING, eos_token_ids=[3, 4]))))
    assert config == LlamaConfig(**SMALL, rope_scaling=RopeScaling(**SCALING), eos_token_ids=(3, 4))
    assert hash(config) == hash(LlamaConfig(**SMALL, rope_scaling=RopeScaling(**SCALING), eos_token_ids=(3, 4)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="mistral"), r"model_type='mistral'"),
        (dict(hidden_act="gelu"), r"hidden_act='gelu'"),
        (dict(attention_bias=True), r"attention_bias=True"),
        (dict(mlp_bias=True), r"mlp_bias=True"),
        (dict(quantization_config={"quant_method": "gptq"}), r"quantization_config=.*gptq"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), r"rope_scaling.rope_type='linear'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), r"rope_parameters.rope_type='yarn'"),
        (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), r"partial_rotary_factor=0.5"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), r"rope_scaling.low_freq_factor is missing"),
        (dict(hidden_size=None), r"hidden_size is missing"),
        (dict(num_attention_heads=5), r"num_attention_heads=5 does not divide hidden_size=32"),
        (dict(num_key_value_heads=3), r"num_key_value_heads=3 does not divide num_attention_heads=4"),
        (dict(head_dim=7), r"head_dim must be even.*7"),
        (dict(vocab_size="64"), r"vocab_size must be a positive integer, got '64'"),
        (dict(num_hidden_layers=0), r"num_hidden_layers must be a positive integer, got 0"),
        (dict(rms_norm_eps=0.0), r"rms_norm_eps must be positive, got 0"),
        (dict(eos_token_id=[2, 64]), r"eos_token_ids: token 64 is outside the vocabulary of 64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        LlamaConfig.from_hf(config_json(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(factor=0.5), "factor must be at least 1, got 0.5"),
        (dict(low_freq_factor=4.0), "low_freq_factor < high_freq_factor, got 4.0 and 4.0"),
        (dict(original_max_position_embeddings=0), "original_max_position_embeddings must be a positive integer"),
    ],
)
def test_bad_scaling(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**SCALING | fields)


def test_linear_shapes_are_in_execution_order():
    shapes = LlamaConfig(**SMALL | dict(head_dim=10)).linear_shapes()
    assert list(shapes.items()) == [
        ("attention/q_proj", (32, 40)),
        ("attention/k_proj", (32, 20)),
        ("attention/v_proj", (32, 20)),
        ("attention/o_proj", (40, 32)),
        ("mlp/gate_proj", (32, 48)),
        ("mlp/up_proj", (32, 48)),
        ("mlp/down_proj", (48, 32)),
    ]


def architecture(vocab, hidden, ffn, layers, heads, kv_heads, head_dim, tied):
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


# The parameter counts that the released models report.
KNOWN = {
    "llama2_7b": (architecture(32000, 4096, 11008, 32, 32, 32, 128, False), 6_738_415_616),
    "llama3_8b": (architecture(128256, 4096, 14336, 32, 32, 8, 128, False), 8_030_261_248),
    "llama32_1b": (architecture(128256, 2048, 8192, 16, 32, 8, 64, True), 1_235_814_400),
    "llama32_3b": (architecture(128256, 3072, 8192, 28, 24, 8, 128, True), 3_212_749_824),
    "llama3_70b": (architecture(128256, 8192, 28672, 80, 64, 8, 128, False), 70_553_706_496),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_released_architectures(name):
    config, count = KNOWN[name]
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_tree(tied):
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    variables = jax.jit(Llama(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert list(variables) == ["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(variables["params"])
    want = {"embedder/embedding": (64, 32), "final_norm/scale": (32,)} | ({} if tied else {"lm_head/kernel": (32, 64)})
    want |= {f"layers/{norm}/scale": (2, 32) for norm in ("attention_norm", "mlp_norm")}
    want |= {f"layers/{path}/kernel": (2, *shape) for path, shape in config.linear_shapes().items()}
    assert {"/".join(key.key for key in path): leaf.shape for path, leaf in flat} == want
    kernel = variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert bool((kernel[0] != kernel[1]).all()), "each layer draws its own weights"
