"""generate.py on an elastic checkpoint: packed, in a batch, at several bits, it writes what the model itself does."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mobiquant_jax.io.checkpoint import save_checkpoint
from mobiquant_jax.io.tokenizer import Tokenizer
from mobiquant_jax.models.elastic import ElasticConfig
from mobiquant_jax.serving import generate

NEW = 7


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, eos_token_ids=[2])


@pytest.fixture
def saved(random_elastic, tokenizer, tmp_path):
    """A function that saves a model and returns it with its folder."""

    def save(**changes):
        model = random_elastic(int(np.random.default_rng().integers(2**31)), tokenizer=tokenizer, **changes)
        save_checkpoint(tmp_path / "checkpoint", model, {})
        return model, f"--checkpoint={tmp_path}/checkpoint"

    return save


def greedy(model, prompts, bits):
    """The continuations by the unpacked model, and the bits it used."""
    rows = [model.tokenizer.encode(prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in rows])
    padded = np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows])
    made = generate(
        model.decode,
        model.variables,
        model.config,
        padded,
        lengths,
        max_new_tokens=NEW,
        bits=np.array(bits),
        eos_token_ids=(2,),
    )
    ends = [[token for token in row[:length] if token != 2] for row, length in zip(*made[:2], strict=True)]
    return [model.tokenizer.decode(row) for row in ends], made.mean_bits


def test_a_ragged_batch_is_that_of_the_unpacked_model(call_script, saved, tmp_path):
    model, checkpoint = saved()
    prompts = ["w5 w17 w40 w3", "w90", "w8 w9"]
    want, bits = greedy(model, prompts, [2.5, 8.0, 3.7])
    (tmp_path / "prompts.txt").write_text(f"{prompts[1]}\n\n{prompts[2]}\n")
    options = [f"--prompt={prompts[0]}", f"--prompts_file={tmp_path}/prompts.txt", "--bits=2.5,8,3.7"]
    result = call_script("generate", checkpoint, *options, f"--max_new_tokens={NEW}")
    assert result.returncode == 0, result.stderr
    lines = [f"[{i + 1}] {prompt}{text}" for i, (prompt, text) in enumerate(zip(prompts, want, strict=True))]
    assert result.stdout.splitlines() == lines
    packed, speed = result.stderr.splitlines()
    assert packed.startswith("on the device: ") and packed.endswith(" MB packed")
    assert speed.startswith("prefill: 7 tokens, ") and "; decode: " in speed
    used = [float(value) for value in speed.removesuffix(" bits on average").rpartition("tokens/s, ")[2].split(", ")]
    np.testing.assert_allclose(used, bits, atol=0.006)


def test_slices_without_a_serving_layout_are_decoded_as_they_are(call_script, saved):
    elastic = ElasticConfig(group_size=32, slice_bits=(2, 2, 4), router_hidden_size=8, budget_grid=(2.0, 4.0, 8.0))
    _, checkpoint = saved(elastic=elastic, num_hidden_layers=1)
    options = [checkpoint, "--prompt=w5 w17", "--max_new_tokens=2"]
    result = call_script("generate", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("w5 w17") and "bits on average" in result.stderr
    assert "not packed: slice bits (2, 2, 4) have no serving layout" in result.stderr
    forced = call_script("generate", *options, "--implementation=reference")
    assert (forced.returncode, forced.stdout) == (2, "")
    assert forced.stderr == "error: slice bits (2, 2, 4) have no serving layout, only (2, 2, 2, 2)\n"
