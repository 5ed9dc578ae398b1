"""GGUF files: every needed type against its definition in float64, rotary layout and scaling, and clear errors."""

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from mobiquant_jax.io import load_gguf
from mobiquant_jax.models import LlamaConfig, RopeScaling, inverse_frequencies

BYTES_PER_BLOCK = {
    Type.Q8_0: (32, 34),
    Type.Q4_0: (32, 18),
    Type.Q4_1: (32, 20),
    Type.Q4_K: (256, 144),
    Type.Q6_K: (256, 210),
}


def half(block, at):
    return block[:, at : at + 2].copy().view(np.float16).astype(np.float64)  # [N, 1]


def decode(kind, block):
    """Blocks of raw bytes [N, bytes] to values [N, block size], straight from ggml's definitions."""
    if kind == Type.Q8_0:
        return half(block, 0) * block[:, 2:].view(np.int8)
    if kind in (Type.Q4_0, Type.Q4_1):
        codes = block[:, -16:]
        q = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float64)
        return half(block, 0) * (q - 8) if kind == Type.Q4_0 else half(block, 0) * q + half(block, 2)
    out = np.empty((len(block), 256))
    if kind == Type.Q4_K:
        d, dmin, packed, codes = half(block, 0)[:, 0], half(block, 2)[:, 0], block[:, 4:16], block[:, 16:]
        for j in range(8):
            if j < 4:
                scale, low = packed[:, j] & 63, packed[:, j + 4] & 63
            else:
                scale = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
                low = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
            chunk = codes[:, 32 * (j // 2) : 32 * (j // 2) + 32]
            q = (chunk >> 4 if j % 2 else chunk & 15).astype(np.float64)
            out[:, 32 * j : 32 * j + 32] = (d * scale)[:, None] * q - (dmin * low)[:, None]
        return out
    scales, d = block[:, 192:208].view(np.int8), half(block, 208)[:, 0]
    for i in range(256):  # Q6_K, value by value
        n, quarter, at = i // 128, i % 128 // 32, i % 32
        low = block[:, 64 * n + 32 * (quarter % 2) + at]
        low = low >> 4 if quarter >= 2 else low & 15
        high = (block[:, 128 + 32 * n + at] >> (2 * quarter)) & 3
        scale = scales[:, 8 * n + 2 * quarter + at // 16]
        out[:, i] = d * scale * ((low | (high << 4)).astype(np.float64) - 32)
    return out


def random_tensor(rng, kind, shape):
    """What add_tensor takes, and the values it stands for in float64."""
    if kind == Type.F32:
        values = rng.standard_normal(shape).astype(np.float32)
        return values, values.astype(np.float64)
    if kind == Type.F16:
        values = rng.standard_normal(shape).astype(np.float16)
        return values, values.astype(np.float64)
    if kind == Type.BF16:
        values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        return (values.view(np.uint8), kind), values.astype(np.float64)
    size, n_bytes = BYTES_PER_BLOCK[kind]
    raw = rng.integers(0, 256, (shape[0] * shape[1] // size, n_bytes), dtype=np.uint8)
    halves = {Type.Q4_1: (0, 2), Type.Q4_K: (0, 2), Type.Q6_K: (208,)}.get(kind, (0,))
    for at in halves:  # any bytes are valid codes, but a scale must be finite
        raw[:, at : at + 2] = rng.uniform(-0.1, 0.1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return (raw.reshape(shape[0], -1), kind), decode(kind, raw).reshape(shape)


def half_rotation_rows(heads, head_dim):
    """The GGUF row that each Hugging Face row comes from."""
    rows = []
    for head in range(heads):
        for row in range(head_dim):
            which, i = divmod(row, head_dim // 2)
            rows.append(head * head_dim + 2 * i + which)
    return rows


@pytest.fixture
def tensors(gguf_shapes, rng):
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in gguf_shapes.items()}


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, *BYTES_PER_BLOCK], ids=lambda kind: kind.name)
def test_every_type(tmp_path, gguf_metadata, gguf_shapes, write_gguf, rng, kind):
    written, values = {}, {}
    for name, shape in gguf_shapes.items():
        written[name], values[name] = random_tensor(rng, kind if len(shape) == 2 else Type.F32, shape)
    config, params = load_gguf(write_gguf(tmp_path / "model.gguf", gguf_metadata, written))
    assert config == LlamaConfig(
        vocab_size=40,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=20000.0,
        tie_word_embeddings=True,
    )

    def same(leaf, value):
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, value, rtol=2e-6, atol=2e-6)

    same(params["embedder"]["embedding"], values["token_embd.weight"])
    same(params["final_norm"]["scale"], values["output_norm.weight"])
    assert "lm_head" not in params
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for layer in range(2):
        block = {name.split(".")[2]: value for name, value in values.items() if name.startswith(f"blk.{layer}.")}
        same(attention["q_proj"]["kernel"][layer], block["attn_q"][half_rotation_rows(4, 64)].T)
        same(attention["k_proj"]["kernel"][layer], block["attn_k"][half_rotation_rows(2, 64)].T)
        same(attention["v_proj"]["kernel"][layer], block["attn_v"].T)
        same(attention["o_proj"]["kernel"][layer], block["attn_output"].T)
        same(mlp["gate_proj"]["kernel"][layer], block["ffn_gate"].T)
        same(mlp["up_proj"]["kernel"][layer], block["ffn_up"].T)
        same(mlp["down_proj"]["kernel"][layer], block["ffn_down"].T)
        same(params["layers"]["attention_norm"]["scale"][layer], block["attn_norm"])
        same(params["layers"]["mlp_norm"]["scale"][layer], block["ffn_norm"])


def test_untied_head_special_tokens_and_dtype(tmp_path, gguf_metadata, tensors, write_gguf, rng):
    head = rng.standard_normal((40, 256)).astype(np.float32)
    gguf_metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in {"bos": 5, "eos": 7, "eot": 9}.items()}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata, {**tensors, "output.weight": head})
    config, params = load_gguf(path, dtype=ml_dtypes.bfloat16)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (5, (7, 9))
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.astype(ml_dtypes.bfloat16).T)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 5e5, (8.0, 1.0, 4.0, 8192)),  # LLaMA 3.1
        (64, 5e5, (32.0, 1.0, 4.0, 8192)),  # LLaMA 3.2 1B
        (128, 1e4, (4.0, 1.0, 3.0, 512)),
        (128, 1e4, (16.0, 2.0, 8.0, 1024)),
    ],
)
def test_llama3_rotary_scaling_is_recovered(
    tmp_path, gguf_metadata, gguf_shapes, tensors, write_gguf, head_dim, theta, scaling
):
    factor, low, high, context = scaling
    divisors = []  # as llama.cpp's converter derives them
    for i in range(0, head_dim, 2):
        turns = context * theta ** (-i / head_dim) / (2 * np.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    heads = 256 // head_dim
    gguf_metadata |= {"llama.rope.freq_base": theta, "llama.rope.dimension_count": head_dim}
    gguf_metadata |= {"llama.attention.head_count": heads, "llama.attention.head_count_kv": heads // 2}
    tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
    config, _ = load_gguf(write_gguf(tmp_path / "model.gguf", gguf_metadata, tensors))
    found = config.rope_scaling
    assert found is not None and found.factor == factor
    # The three others count only up to a common scale.
    assert found.high_freq_factor / found.low_freq_factor == pytest.approx(high / low, rel=1e-3)
    assert found.original_max_position_embeddings / found.low_freq_factor == pytest.approx(context / low, rel=1e-3)
    if low == 1:
        assert found == RopeScaling(
            factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=context
        )
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(inverse_frequencies(config), plain / divisors, rtol=1e-4)


def test_rotary_divisors_of_one_mean_no_scaling(tmp_path, gguf_metadata, tensors, write_gguf):
    tensors["rope_freqs.weight"] = np.ones(32, np.float32)
    assert load_gguf(write_gguf(tmp_path / "model.gguf", gguf_metadata, tensors))[0].rope_scaling is None


def test_other_rotary_scalings_are_refused(tmp_path, gguf_metadata, tensors, write_gguf, rng):
    path = tmp_path / "model.gguf"
    for factors in (1 + rng.random(32) * 7, np.linspace(1, 8, 32), np.full(32, 0.5), np.full(7, 2.0)):
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
        with pytest.raises(ValueError) as error:
            load_gguf(write_gguf(path, gguf_metadata, tensors))
        assert_one_line(error, "model.gguf", "rope_freqs.weight", "rotary scaling")
    del tensors["rope_freqs.weight"]
    with pytest.raises(ValueError) as error:
        load_gguf(write_gguf(path, {**gguf_metadata, "llama.rope.scaling.type": "yarn"}, tensors))
    assert_one_line(error, "model.gguf", "'yarn'")


def test_truncated_anywhere(tmp_path, gguf_metadata, tensors, write_gguf):
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata, tensors)
    content = path.read_bytes()
    for keep in (0, 3, 10, 24, 100, 500, 900, 1500, 3000, len(content) // 2, len(content) - 64, len(content) - 4):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError) as error:
            load_gguf(path)
        assert_one_line(error, "model.gguf", "truncated or damaged")
    path.write_bytes(b"PK" + content[2:])
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_gguf(path)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        load_gguf(tmp_path / "nowhere.gguf")


def test_wrong_tensors_are_named(tmp_path, gguf_metadata, tensors, write_gguf):
    name = "blk.1.attn_v.weight"
    cases = [
        ({name: tensors[name][:64]}, (name, "(64, 256)", "(128, 256)")),
        ({"blk.0.attn_q.bias": tensors[name][0]}, ("unexpected", "blk.0.attn_q.bias")),
        ({name: None}, ("missing tensor", name)),
        ({"token_embd.weight": None}, ("missing tensor", "token_embd.weight")),
    ]
    for change, parts in cases:
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(ValueError) as error:
            load_gguf(write_gguf(tmp_path / "model.gguf", gguf_metadata, changed))
        assert_one_line(error, "model.gguf", *parts)


def test_unsupported_models_are_named(tmp_path, gguf_metadata, tensors, write_gguf):
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError) as error:
        load_gguf(write_gguf(path, gguf_metadata, tensors, architecture="qwen2"))
    assert_one_line(error, "model.gguf", "'qwen2'", "'llama'")
    changes = [
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"llama.attention.head_count": [4, 4]}, "head counts that differ"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count = 32"),
        ({"llama.attention.head_count_kv": 3}, "num_key_value_heads=3"),
    ]
    for change, part in changes:
        with pytest.raises(ValueError) as error:
            load_gguf(write_gguf(path, {**gguf_metadata, **change}, tensors))
        assert_one_line(error, "model.gguf", part)
    with pytest.raises(NotImplementedError, match="one of 3 parts"):
        load_gguf(write_gguf(path, {**gguf_metadata, "split.count": 3}, tensors))
    del gguf_metadata["llama.block_count"]
    with pytest.raises(ValueError, match="no metadata 'llama.block_count'"):
        load_gguf(write_gguf(path, gguf_metadata, tensors))


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path, gguf_metadata, tensors, write_gguf):
    tensors["blk.1.ffn_up.weight"] = (np.zeros((512, 292), np.uint8), Type.Q8_K)
    with pytest.raises(NotImplementedError) as error:
        load_gguf(write_gguf(tmp_path / "model.gguf", gguf_metadata, tensors))
    assert_one_line(error, "model.gguf", "blk.1.ffn_up.weight", "Q8_K")
