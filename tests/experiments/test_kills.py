"""A sharded calibration of a real model, killed at random moments and resumed, once on fewer devices.

Minutes long, so `pytest -m slow` runs it and nothing else does; ``--record=FILE.json`` keeps what it measured.

Resumed on the same mesh, a run must end with the very bits of one that nothing interrupted: blocks and states of tuning
are saved whole, the streams are recomputed by the same programs, and every draw depends on the seed and a number alone.
On another mesh the sums over devices run in another order: losses, thresholds and routers may differ by 1e-5, codes not
at all, and so may perplexities, measured on the same mesh. Measured on two meshes, those of one and the same checkpoint
differ by more: a token whose score lies within rounding of the threshold reads another depth. That has moved one by
2.5e-4, so 1e-3 is allowed there.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mobiquant_jax.calibration.run_dir import FINE, ROUTED, ROUTER, SLICE, TUNING, RunDir
from mobiquant_jax.files import save_json
from mobiquant_jax.io.checkpoint import load_checkpoint
from mobiquant_jax.provenance import provenance

ROOT = Path(__file__).parents[2]
KILLS = 10
TOLERANCE, OTHER_MESH_TOLERANCE = 1e-5, 1e-3  # relative, where a part of the run was on another mesh
MESHES = {8: dict(data=4, fsdp=2), 4: dict(data=2, fsdp=2)}  # `model` does not divide this model's 172 channels
RECIPE = (
    "windows=32",
    "window_length=64",
    "batch_size=8",
    "budgets=2,3,4,8",
    "threshold_windows=8",
    "epochs=3",
    "end_epochs=2",
    "routed_epochs=2",
    "slice_epochs=1",
    "fine_above=4",
    "fine_epochs=1",
    "fit_epochs=2",
    "fit_batch_size=8",
    "end_batch_size=8",
    "end_save_seconds=0",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(shared_data, tmp_path_factory):
    """``(run folder, devices, log) -> Popen``: starts, or continues, a run on so many fake devices."""
    stories = shared_data / "stories260K"
    compiled = tmp_path_factory.mktemp("compiled")

    def begin(run, devices, log):
        settings = [f"calibration.{setting}" for setting in RECIPE]
        settings += [f"mesh.{axis}={size}" for axis, size in MESHES[devices].items()]
        settings += [f"model.source={stories}", f"data.source=tokens:{stories}/windows.npy", f"run_dir={run}"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "experiments/calibrate.py", "--config=configs/stories260k.py", "--resume"]
        command += [f"--config.{setting}" for setting in settings]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    return begin


def finished_parts(run):
    """How far the folder of a run says that it has come."""
    saved = RunDir(path=run)
    blocks = sum(entry.name.isdigit() for entry in saved.blocks.glob("*"))
    epochs = {f"{stage}_epochs": saved.saved_epochs(stage) for stage in (TUNING, ROUTED, f"{SLICE}/4", FINE, ROUTER)}
    return {"blocks": blocks, **epochs, "checkpoint": (run / "checkpoint").is_dir()}


def outcome(run):
    """Perplexity by average bits, and the checkpoint's arrays by name; reading it compares every file's CRC-32."""
    curve = {row["bits"]: row["perplexity"] for row in json.loads((run / "curve.json").read_text())}
    leaves = jax.tree_util.tree_leaves_with_path(load_checkpoint(run / "checkpoint").variables)
    return curve, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(run):
    """Losses by block and epoch. A kill before its state is saved repeats an epoch; repeated lines must agree."""
    found = {}
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        key = next(iter(row.items()))  # ("block", 3), ("tuning_epoch", 1), ...
        value = {name: row[name] for name in ("before", "after", "bits", "divergence") if name in row}
        assert found.setdefault(key, value) == pytest.approx(value, rel=TOLERANCE), key
    return found


def bit_for_bit(arrays, wanted):
    return arrays.keys() == wanted.keys() and all(
        array.dtype == wanted[name].dtype and array.tobytes() == wanted[name].tobytes()
        for name, array in arrays.items()
    )


def furthest(curve, wanted):
    """The largest relative difference of perplexities."""
    assert curve.keys() == wanted.keys()
    return max(abs(curve[bits] / wanted[bits] - 1) for bits in wanted)


def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(start, tmp_path, request):
    def complete(run, devices=8):
        begin, log = time.monotonic(), tmp_path / f"{run.name}.log"
        with log.open("a") as file:
            assert start(run, devices, file).wait() == 0, log.read_text()
        return time.monotonic() - begin

    complete(whole := tmp_path / "whole")  # it compiles: the next one takes as long as those that are killed
    seconds = complete(again := tmp_path / "again")
    wanted, arrays = outcome(whole)
    assert outcome(again)[0] == wanted and bit_for_bit(outcome(again)[1], arrays)

    seed = request.config.getoption("seed") or random.SystemRandom().randrange(1, 10**6)
    rng = random.Random(seed)
    print(f"seed {seed}; a whole run takes {seconds:.1f} s")
    kills, runs, moved = [], [], False
    while len(kills) < KILLS or runs[-1]["seconds"] is None:
        if not runs or runs[-1]["seconds"] is not None:
            runs.append({"devices": [8], "seconds": None})
        run, devices = tmp_path / f"run{len(runs)}", runs[-1]["devices"]
        state = finished_parts(run)
        if not moved and state["blocks"] and not state["checkpoint"]:
            devices.append(4)
            moved = True
        begin, moment = time.monotonic(), rng.uniform(0, seconds)
        with (tmp_path / f"{run.name}.log").open("a") as log:
            process = start(run, devices[-1], log)
            try:
                code = process.wait(timeout=moment if len(kills) < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                assert process.wait() == -9
                kills.append({"run": len(runs), "devices": devices[-1], "after_seconds": round(moment, 2)})
                kills[-1] |= finished_parts(run)
                print(kills[-1])
                continue
        assert code == 0, (tmp_path / f"{run.name}.log").read_text()
        runs[-1]["seconds"] = round(time.monotonic() - begin, 1)

    assert moved, f"seed {seed} killed no run between its first block and its checkpoint"
    for number, entry in enumerate(runs, start=1):
        run = tmp_path / f"run{number}"
        curve, found = outcome(run)
        if entry["devices"] != [8]:
            entry["difference_measured_on_4_devices"] = furthest(curve, wanted)
            complete(run)  # nothing is left but to measure again, where the others were measured
            curve = outcome(run)[0]
        entry["difference"] = furthest(curve, wanted)
        entry["peak_gb"] = json.loads((run / "result.json").read_text())["peak_gb"]  # of its last process
        entry["bit_for_bit"] = curve == wanted and bit_for_bit(found, arrays)
        print(entry)
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
        for key, value in losses(run).items():
            assert value == pytest.approx(losses(whole)[key], rel=TOLERANCE), key
        for name, array in found.items():
            limit = 0 if np.issubdtype(array.dtype, np.integer) else TOLERANCE  # codes and zero points are integers
            pair = (np.asarray(array, np.float64), np.asarray(arrays[name], np.float64))
            np.testing.assert_allclose(*pair, rtol=limit, atol=limit, err_msg=name)
    if request.config.getoption("record"):
        command = "python -m pytest -m slow tests/experiments/test_kills.py --record=results/kills.json"
        save_json(
            request.config.getoption("record"),
            {
                "provenance": provenance() | {"command": command},
                "seed": seed,
                "whole_run_seconds": round(seconds, 1),
                "perplexity": [{"bits": bits, "perplexity": value} for bits, value in wanted.items()],
                "kills": kills,
                "runs": runs,
            },
        )
    for entry in runs:
        assert entry["bit_for_bit"] or entry["devices"] != [8], entry
        assert entry["difference"] <= TOLERANCE, entry
        assert entry.get("difference_measured_on_4_devices", 0.0) <= OTHER_MESH_TOLERANCE, entry
