"""The whole of calibrate.py on a real model, stories260K: what a run leaves, runs that are killed, and mistakes.

Killed runs and whole ones share compiled programs through JAX's cache on disk, which saves most of the time of a run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

from mobiquant_jax.io.checkpoint import load_checkpoint
from mobiquant_jax.routing import RandomDepth

ROOT = Path(__file__).parents[2]
BITS = (2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
RECIPE = (
    "windows=16",
    "threshold_windows=8",
    "window_length=128",
    "epochs=3",
    "weight_lr=5e-5",
    "clipping_lr=3e-3",
    "end_epochs=2",
    "fit_epochs=2",
    "end_batch_size=2",
    "end_weight_lr=1e-5",
    "end_clipping_lr=3e-4",
    "end_save_seconds=0",  # every epoch, so that the runs that are killed lose one at most
)


@pytest.fixture(scope="module")
def arguments(shared_data):
    """``(run folder, more) -> command line`` of the tests' run."""
    stories = shared_data / "stories260K"

    def make(run_dir, *more):
        return [
            "--config=configs/stories260k.py",
            f"--config.model.source={stories}",
            f"--config.data.source=tokens:{stories}/windows.npy",
            f"--config.run_dir={run_dir}",
            *(f"--config.calibration.{setting}" for setting in RECIPE),
            *more,
        ]

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def environment(folder):
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def finished(folder, arguments, environment, run_script):
    """The folder of a run that nothing interrupted, and what it printed."""
    result = run_script("calibrate", *arguments(folder / "whole"), **environment)
    assert result.returncode == 0, result.stderr
    return folder / "whole", result.stdout


@pytest.fixture(scope="module")
def curve(finished):
    rows = json.loads((finished[0] / "curve.json").read_text())
    return {row["bits"]: row for row in rows}


@pytest.fixture(scope="module")
def model(finished):
    return load_checkpoint(finished[0] / "checkpoint")


@pytest.fixture(scope="module")
def heldout(shared_data):
    """The windows of the run's own evaluation: the last quarter of the file."""
    return np.load(shared_data / "stories260K" / "windows.npy")[96:112].astype(np.int32)


def test_a_run_leaves_a_checkpoint_a_curve_and_its_history(finished, curve):
    run, printed = finished
    assert sorted(entry.name for entry in run.iterdir()) == [
        "checkpoint",
        "curve.json",
        "curve.png",
        "metrics.jsonl",
        "result.json",
        "run.json",
    ]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG") and (run / "curve.png").stat().st_size > 10_000
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["block"] for row in metrics[:5]] == list(range(5))
    assert all(row["after"] < row["before"] and row["note"] == "" for row in metrics[:5])
    assert [row["tuning_epoch"] for row in metrics[5:7]] == [row["router_epoch"] for row in metrics[7:]] == [0, 1]
    assert all(row["healthy"] for row in metrics[5:])
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["calibration.windows"] == 16 and record["provenance"]
    assert list(curve) == [*BITS, None]
    assert all(row.keys() == {"bits", "measured_bits", "perplexity", "tokens"} for row in curve.values())
    assert {row["tokens"] for row in curve.values()} == {16 * 255}
    lines = printed.splitlines()
    assert lines[0].startswith("block  1/5  error ") and lines[-1].startswith(f"checkpoint: {run}/checkpoint ")
    for bits, row in curve.items():
        name = "unquantized" if bits is None else f"{bits:g}"
        assert any(line.split()[:1] == [name] and f" {row['perplexity']:.3f}" in line for line in lines)


def test_one_checkpoint_serves_every_width(curve):
    deeper = [curve[bits]["perplexity"] for bits in BITS]
    print("perplexity at", BITS, "bits:", deeper, "unquantized:", curve[None]["perplexity"])
    assert all(after <= 1.005 * before for before, after in zip(deeper, deeper[1:], strict=False))
    assert curve[8.0]["perplexity"] == pytest.approx(curve[None]["perplexity"], rel=0.01)
    assert deeper[0] < 3 * curve[None]["perplexity"]  # 2 bits work; round-to-nearest gives more than ten times
    for bits in BITS:
        assert curve[bits]["measured_bits"] == pytest.approx(bits, abs=0.1)


def test_the_trained_router_beats_random_depths_at_3_bits(model, curve, heldout):
    @jax.jit
    def score(key):
        logits, bits = model.forward_with(model.variables, heldout, RandomDepth(bits=jnp.full(len(heldout), 3.0)), key)
        target = jnp.asarray(heldout)[:, 1:, None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), target, axis=-1).mean(), bits.mean()

    scored = [score(jax.random.key(seed)) for seed in range(4)]
    random = [float(np.exp(-nll)) for nll, _ in scored]
    print("3 bits: router", curve[3.0], "random depths", random)
    for (_, bits), perplexity in zip(scored, random, strict=True):
        # Equal bits: what the router reads beyond the request is at most what the random one does, or it pays for it.
        assert bits == pytest.approx(3.0, abs=0.02)
        assert curve[3.0]["perplexity"] < 0.98 * perplexity


def test_changing_the_bits_of_a_checkpoint_compiles_nothing(model, heldout):
    tokens, sweep = jnp.asarray(heldout[:1, :64]), np.arange(2, 8.25, 0.25)
    logits = [model.apply_fn(model.variables, tokens, 2.0)]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    before = model.apply_fn._cache_size()
    logits += [model.apply_fn(model.variables, tokens, float(bits)) for bits in sweep]
    jax.block_until_ready(logits)
    assert len(sweep) == 25 and compiled == [] and model.apply_fn._cache_size() == before
    assert len({np.asarray(each).tobytes() for each in logits}) > 15  # the bits had an effect


def test_a_new_process_gives_the_same_numbers(finished, curve, environment, folder, shared_data, run_script):
    """evaluate.py on the checkpoint: to the last bit the perplexities that calibrate.py measured before reloading."""
    run, windows = finished[0], shared_data / "stories260K" / "windows.npy"
    arguments = [f"--checkpoint={run}/checkpoint", f"--data=tokens:{windows}", "--split=heldout", "--windows=16"]
    arguments += ["--window_length=256", "--batch_size=4", "--bits=2,3,8", f"--json={folder}/again.json"]
    result = run_script("evaluate", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "again.json").read_text()) == [curve[bits] for bits in (2.0, 3.0, 8.0)]


def kill_after(line_start, command, environment):
    """Runs a command and sends SIGKILL as soon as it prints a line that starts so; returns what it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(line_start):
            process.send_signal(signal.SIGKILL)
            break
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    return "".join(printed)


def test_a_run_killed_three_times_ends_with_the_same_checkpoint(finished, folder, arguments, environment, run_script):
    """In the middle of the blocks, of end-to-end tuning and of fitting the routers."""
    whole, run = finished[0], folder / "killed"
    command = [sys.executable, "experiments/calibrate.py", *arguments(run)]
    kill_after("block  2/5", command, environment)
    blocks = {entry.name for entry in (run / "blocks").iterdir() if entry.name.isdigit()}
    done = len(blocks)  # more than 2 where the kill came late
    assert 2 <= done < 5 and blocks == {f"{block:03d}" for block in range(done)} and not (run / "checkpoint").exists()
    printed = kill_after("end to end 1/2", [*command, "--resume"], environment)
    assert printed.startswith(
        f"{done} of 5 blocks are on disk already; continuing with block {done + 1}\nblock  {done + 1}/5"
    )
    assert not (run / "tuning" / "002").exists() and not (run / "checkpoint").exists()
    printed = kill_after("routers 1/2", [*command, "--resume"], environment)
    assert "none is left to train" in printed and "end to end 1/2" not in printed
    assert (run / "tuning" / "002").exists() and not (run / "checkpoint").exists()
    result = run_script("calibrate", *arguments(run, "--resume"), **environment)
    assert result.returncode == 0, result.stderr
    assert "end to end" not in result.stdout and "routers 1/2" not in result.stdout and "routers 2/2" in result.stdout

    trees = [load_checkpoint(path / "checkpoint").variables for path in (whole, run)]
    for (path, wanted), got in zip(
        jax.tree_util.tree_leaves_with_path(trees[0]), jax.tree.leaves(trees[1]), strict=True
    ):
        assert wanted.dtype == got.dtype and np.asarray(wanted).tobytes() == np.asarray(got).tobytes(), path
    assert (whole / "curve.json").read_text() == (run / "curve.json").read_text()
    took = [json.loads((path / "result.json").read_text())["calibration_seconds"] for path in (whole, run)]
    assert took[0] > 0 and took[1] is None  # of a run that was continued it is not known
    assert sorted(entry.name for entry in run.iterdir()) == sorted(entry.name for entry in whole.iterdir())

    # Nothing is left to do, and a recipe that differs is refused without touching the run.
    before = {entry: entry.stat().st_mtime_ns for entry in run.rglob("*")}
    result = run_script("calibrate", *arguments(run, "--config.calibration.seed=1", "--resume"), **environment)
    message = f"error: '{run}' was started with calibration.seed=0, not 1: --overwrite starts over\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
    assert {entry: entry.stat().st_mtime_ns for entry in run.rglob("*")} == before


@pytest.fixture(scope="module")
def damaged(folder, shared_data):
    """Copies of the model, each with one thing wrong."""
    source = shared_data / "stories260K"
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"

    def copy(kind):
        target = folder / "models" / kind
        target.mkdir(parents=True)
        shutil.copy(source / "config.json", target)
        return target / "model.safetensors"

    copy("missing")
    copy("truncated").write_bytes((source / "model.safetensors").read_bytes()[:-1000])
    copy("empty").write_bytes(b"")
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, copy("shape"))
    save_file({key: value for key, value in tensors.items() if key != name}, copy("tensor"))
    save_file(tensors, copy("text"))
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "models" / "text" / "tokenizer.json"))
    (folder / "models" / "empty.txt").write_text(" \n\n\t\n")
    (folder / "models" / "short.txt").write_text("Once upon a time.\n" * 20)
    tokens = np.load(source / "windows.npy").copy()
    tokens[40, 7] = 512
    np.save(folder / "models" / "tokens.npy", tokens)
    np.save(folder / "models" / "few.npy", tokens[:8])
    np.save(folder / "models" / "float.npy", tokens.astype(np.float32))
    (folder / "models" / "file").write_text("precious")
    return folder / "models"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # so ml_collections reads a config file
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.source={models}/missing"],
            "{models}/missing: no model.safetensors and no model.safetensors.index.json",
        ),
        (["model.source={models}/truncated"], "{models}/truncated/model.safetensors"),
        (["model.source={models}/empty"], "{models}/empty/model.safetensors"),
        (["model.source={models}/shape"], "model.layers.3.mlp.up_proj.weight"),
        (["model.source={models}/tensor"], "model.layers.3.mlp.up_proj.weight"),
        (["model.source={models}/nowhere"], "no file or folder '{models}/nowhere'"),
        (["model.source="], "the model's source is empty: give a folder, a .gguf file or package:NAME"),
        (["model.architecture.hidden_size=128"], "its hidden_size is 64, not 128"),
        (["quant.group_size=7"], "attention/q_proj: group size 7 does not divide the 64 input features"),
        (["quant.group_size=0"], "group size 0"),
        (["quant.slice_bits=2,2,2"], "slice bits (2, 2, 2) must be 1, 2, 4 or 8 each and add up to 8"),
        (["router.budget_grid=3,8"], "budget grid (3, 8) must rise from 2 to 8 bits"),
        (["calibration.budgets=1,8"], "calibration.budgets must lie in [2, 8], got (1, 8)"),
        (["evaluation.bits=2,9"], "average bits must be between 2 and 8, got 9"),
        (["evaluation.bits=1.5"], "average bits must be between 2 and 8, got 1.5"),
        (["quant.groupsize=4"], "unknown config field 'quant.groupsize' (nearest: 'quant.group_size')"),
        (["data.source=tokens:{models}/tokens.npy"], "token 512 at position 10247 is outside the vocabulary of 512"),
        (["data.source=tokens:{models}/few.npy"], "windows of 128 tokens, not 16"),
        (["data.source=tokens:{models}/float.npy"], "of float32, not integer ids"),
        (["data.source=pydoc"], "the model has no tokenizer for the text of 'pydoc'"),
        (["data.source=file:{models}/empty.txt", "model.source={models}/text"], "empty.txt' is empty"),
        (["data.source=file:{models}/short.txt", "model.source={models}/text"], "windows of 128 tokens, not 16"),
        (["data.source=file:{models}/no.txt", "model.source={models}/text"], "no text file '{models}/no.txt'"),
        (["calibration.window_length=1024"], "exceeds the model's context of 512 tokens"),
        (["run_dir={models}/file"], "'{models}/file' is a file, not a folder: choose another run_dir"),
        (["run_dir={models}"], "'{models}' holds files but no calibration run: choose another run_dir"),
        (["run_dir="], "run_dir is empty: give --config.run_dir=FOLDER"),
    ],
    ids=lambda value: value[0].partition("{")[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(call_script, arguments, damaged, tmp_path, changes, message):
    before = sorted(damaged.rglob("*"))
    fields = [f"--config.{change}".replace("{models}", str(damaged)) for change in changes]
    result = call_script("calibrate", *arguments(tmp_path / "run", *fields))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message.replace("{models}", str(damaged)) in result.stderr
    assert not list(tmp_path.iterdir()) and sorted(damaged.rglob("*")) == before
    assert (damaged / "file").read_text() == "precious"


def test_a_checkpoint_of_another_model_is_refused(call_script, finished, folder, shared_data):
    """config.json of a wider model beside the variables of this one."""
    other = folder / "other"
    shutil.copytree(finished[0] / "checkpoint", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 520}))
    windows = shared_data / "stories260K" / "windows.npy"
    result = call_script("evaluate", f"--checkpoint={other}", f"--data=tokens:{windows}", f"--json={folder}/no.json")
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.count("\n") == 1
    assert "cannot be read as this model's variables" in result.stderr and "(512, 64), not" in result.stderr
    assert not (folder / "no.json").exists()
