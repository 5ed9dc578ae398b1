"""Tokenizers from both kinds of source against tokenizer.json files in Hugging Face's own form."""

import json
import logging
import pydoc_data.topics

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from mobiquant_jax.io import load_dense, load_tokenizer

# Years, capitals after an apostrophe and empty lines are what the kinds of pre-tokenizer cut differently.
TEXT = "\n\n".join(pydoc_data.topics.topics.values())[:200_000] + "zzy 2024 it'S\n\n" * 500
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
USER_DEFINED = "<tool>"

# The words of LLaMA 3, SmolLM and GPT-2 as their tokenizer.json files describe them.
LLAMA3_PATTERN = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "gpt-2": BYTE_LEVEL,
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
            {**BYTE_LEVEL, "use_regex": False},
        ],
    },
}


@pytest.fixture(scope="module")
def vocabulary():
    """A trained byte-level vocabulary (special tokens first) and its merges."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[*SPECIAL, USER_DEFINED], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    model = json.loads(trained.to_str())["model"]
    # One whole word without merges: only ignore_merges finds it.
    return {**model["vocab"], "zzyzx": len(model["vocab"])}, model["merges"]


@pytest.fixture
def reference(vocabulary):
    """The tokenizers library on a tokenizer.json in Hugging Face's form."""

    def reference(pre):
        vocab, merges = vocabulary
        added = [
            {
                "id": vocab[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token != USER_DEFINED,
            }
            for token in (*SPECIAL, USER_DEFINED)
        ]
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocab,
            "merges": merges,
        }
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZERS[pre],
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": model,
        }
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    return reference


@pytest.fixture
def gguf_tokenizer(tmp_path, vocabulary, write_gguf):
    """A GGUF file that holds the vocabulary and no model."""

    def gguf_tokenizer(pre, tensors=None, **metadata):
        vocab, merges = vocabulary
        tokens = sorted(vocab, key=vocab.__getitem__)
        types = [3 if token in SPECIAL else 4 if token == USER_DEFINED else 1 for token in tokens]
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.eot_token_id": 2,
            "tokenizer.chat_template": "{{ messages }}",
        }
        return write_gguf(
            tmp_path / "tokenizer.gguf", {**keys, **metadata}, tensors or {"none": np.zeros(1, np.float32)}
        )

    return gguf_tokenizer


@pytest.fixture
def texts(rng):
    """Spaces, digits, contractions, special tokens, and random characters of every plane and of few kinds."""
    planes = ["".join(map(chr, rng.integers(low, high, 300))) for low, high in ((1, 0xD7FF), (0x10000, 0x10FFFF))]
    few = ["".join(rng.choice(list("a1 '\t\n\r.éß中🙂sStT"), 200)) for _ in range(20)]
    fixed = [
        "",
        " ",
        "\r\n \n",
        "1234567 it's we'LL  end  ",
        "zzyzx zzyzx",
        "a<|turn|>b <|end|> <tool>c<|beg",
        TEXT[:20_000],
    ]
    return [*fixed, *planes, *few]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_equals_the_hugging_face_tokenizer(reference, gguf_tokenizer, texts, pre):
    tokenizer, expected = load_tokenizer(gguf_tokenizer(pre)), reference(pre)
    assert tokenizer.vocab_size == expected.get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1, 2))
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ids.tolist() == expected.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_the_pre_tokenizers_differ(gguf_tokenizer):
    """The texts tell the kinds apart, so that the comparison above means something."""
    encoded = {
        pre: tuple(load_tokenizer(gguf_tokenizer(pre)).encode("zzyzx 2024 it'S\n\n x")) for pre in PRE_TOKENIZERS
    }
    assert len(set(encoded.values())) == 3


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_saved_folder_loads_here_and_in_transformers(tmp_path, gguf_tokenizer, hf_config, texts, pre):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(gguf_tokenizer(pre))
    folder = tmp_path / "saved"
    folder.mkdir()
    tokenizer.save(folder)
    again = load_tokenizer(folder)
    assert (again.bos_token_id, again.eos_token_ids) == (0, (1,))
    (folder / "config.json").write_text(json.dumps({**hf_config, "eos_token_id": [1, 2]}))
    again = load_tokenizer(folder)
    assert (again.bos_token_id, again.eos_token_ids) == (0, (1, 2))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token, theirs.eos_token, theirs.chat_template) == (SPECIAL[0], SPECIAL[1], "{{ messages }}")
    # LLaMA 3's adds a start token when asked for whole sequences; SmolLM's never does.
    assert (theirs("x").input_ids[0] == 0) == (pre == "llama-bpe")
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert again.encode(text).tolist() == ids
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text


def test_the_file_decides_about_the_start_token(tmp_path, gguf_tokenizer):
    for pre, key, added in (("llama-bpe", False, 0), ("smollm", True, 1)):
        tokenizer = load_tokenizer(gguf_tokenizer(pre, **{"tokenizer.ggml.add_bos_token": key}))
        assert 0 not in tokenizer.encode("x")
        tokenizer.save(tmp_path)
        saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert saved.encode("x").ids.count(0) == added


def test_a_folder_keeps_its_own_configuration(tmp_path, reference):
    backend = reference("smollm")
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": SPECIAL[0]}, "eos_token": SPECIAL[1], "tokenizer_class": "GPT2TokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1, 2))
    assert tokenizer.decode(tokenizer.encode("neither cut nor padded")) == "neither cut nor padded"
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved == {**saved, **config, "chat_template": "{{ bos_token }}"}


def test_ids_outside_the_vocabulary(gguf_tokenizer):
    tokenizer = load_tokenizer(gguf_tokenizer("smollm"))
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token_id} is not in the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([3, token_id])
    for name in ("eos", "eot"):
        with pytest.raises(ValueError, match="token id 9999 is not in the vocabulary"):
            load_tokenizer(gguf_tokenizer("smollm", **{f"tokenizer.ggml.{name}_token_id": 9999}))


def test_missing_and_damaged(tmp_path, write_gguf, gguf_tokenizer):
    with pytest.raises(ValueError, match="tokenizer.gguf: damaged tokenizer"):
        load_tokenizer(gguf_tokenizer("smollm", **{"tokenizer.ggml.merges": ["no such"]}))
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(write_gguf(tmp_path / "none.gguf", {}, {"none": np.zeros(1, np.float32)}))


def test_other_gguf_tokenizers_are_named(gguf_tokenizer, gguf_metadata, gguf_shapes, rng, caplog):
    with pytest.raises(NotImplementedError, match="tokenizer 'gpt2' with pre-tokenizer 'tekken' is not supported"):
        load_tokenizer(gguf_tokenizer("tekken"))
    path = gguf_tokenizer("default", **{"tokenizer.ggml.model": "llama"})
    with pytest.raises(NotImplementedError, match="tokenizer 'llama'"):
        load_tokenizer(path)
    # The model itself still loads, and says what it lacks.
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in gguf_shapes.items()}
    path = gguf_tokenizer("default", tensors, **{"tokenizer.ggml.model": "llama"}, **gguf_metadata)
    with caplog.at_level(logging.WARNING):
        config, _, tokenizer = load_dense(path)
    assert config.vocab_size == 40 and tokenizer is None
    assert "loaded without a tokenizer" in caplog.text and "'llama'" in caplog.text
