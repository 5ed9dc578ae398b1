"""baselines.py on a real model: the rows it writes, how it resumes, and mistakes before any work."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mobiquant_jax.evaluation import evaluate_perplexity
from mobiquant_jax.io import load_dense, save_hf
from mobiquant_jax.io.load import load_model
from mobiquant_jax.io.tokenizer import Tokenizer

# ml_collections loads config files in a way that Python means to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

LENGTH = 64


@pytest.fixture
def arguments(shared_data: Path, tmp_path: Path) -> list[str]:
    """A small calibration of the 260-thousand-parameter model, scored on eight other windows."""
    folder = shared_data / "stories260K"
    windows = np.load(folder / "windows.npy")
    np.save(tmp_path / "valid.npy", windows[100:108, :LENGTH])
    np.save(tmp_path / "other.npy", windows[108:112, :LENGTH])
    return [
        "--config=configs/stories260k.py",
        f"--config.model.source={folder}",
        f"--config.data.source=tokens:{folder}/windows.npy",
        "--config.quant.group_size=4",
        "--config.calibration.windows=4",
        f"--config.calibration.window_length={LENGTH}",
        f"--config.evaluation.window_length={LENGTH}",
        "--config.evaluation.batch_size=4",
        "--dtype=float32",
        f"--text=valid=tokens:{tmp_path}/valid.npy",
        f"--json={tmp_path}/rows.json",
    ]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_rows_are_written_resumed_and_reused_as_recipes(call_script, arguments: list[str], tmp_path: Path):
    quick = ["--bits=2,4", "--set=omniquant.epochs=1", "--set=omniquant@2.clipping_lr=0.01,0.3", "--elsewhere"]
    first = call_script("baselines", *arguments, "--methods=rtn,omniquant", *quick)
    assert first.returncode == 0, first.stderr
    rows = read(tmp_path / "rows.json")
    found = [(row["method"], row["calibrated_bits"], row["bits"], row["seed"]) for row in rows]
    tuned = [("omniquant", 2, 2, 0), ("omniquant", 2, 4, 0)]
    assert found == [
        ("unquantized", None, None, None),
        ("rtn", 2, 2, None),
        ("rtn", 4, 4, None),
        *tuned,
        *tuned,
        ("omniquant", 4, 4, 0),
        ("omniquant", 4, 2, 0),
    ]
    for row in rows:
        assert row["measured_bits"] == (32.0 if row["bits"] is None else row["bits"])
        assert (row["text"], row["tokens"]) == ("valid", 8 * (LENGTH - 1))
        assert row["seconds"] >= 0 and row["settings_tried"] is None
    perplexity = {(row["method"], row["calibrated_bits"], row["bits"]): row["perplexity"] for row in rows}
    dense = perplexity["unquantized", None, None]
    assert dense < perplexity["rtn", 4, 4] < perplexity["rtn", 2, 2]
    assert perplexity["omniquant", 4, 2] > 1.5 * perplexity["omniquant", 4, 4]
    assert {row["settings"].get("clipping_lr") for row in rows if row["bits"] == 2} == {None, 0.01, 0.3}
    assert len(first.stdout.splitlines()) == len(rows)

    # What is there is not made again; another text and another seed are added.
    more = [*arguments, "--methods=rtn,omniquant", *quick, f"--text=other:2=tokens:{tmp_path}/other.npy"]
    again = call_script("baselines", *more, "--resume")
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.splitlines()) == len(rows) and all(" other " in line for line in again.stdout.splitlines())
    grown = read(tmp_path / "rows.json")
    assert grown[: len(rows)] == rows and {row["tokens"] for row in grown[len(rows) :]} == {2 * (LENGTH - 1)}
    third = call_script("baselines", *more, "--resume")
    assert (third.returncode, third.stdout) == (0, "")

    # The best of two rates on the first text is what the next table is made with.
    (tmp_path / "valid.json").write_text(json.dumps(json.loads((tmp_path / "rows.json").read_text()) | {"rows": rows}))
    final = [*arguments[:-1], f"--json={tmp_path}/final.json", f"--recipes={tmp_path}/valid.json"]
    last = call_script("baselines", *final, "--methods=omniquant", "--bits=2")
    assert last.returncode == 0, last.stderr
    (row,) = (row for row in read(tmp_path / "final.json") if row["method"] == "omniquant")
    tried = [r for r in rows if (r["method"], r["calibrated_bits"], r["bits"]) == ("omniquant", 2, 2)]
    best = min(tried, key=lambda r: r["perplexity"])
    assert (row["settings"], row["settings_tried"]) == (best["settings"], 2)
    assert row["perplexity"] == pytest.approx(best["perplexity"], rel=0.01)  # then made together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits=2,9"], "a fixed-width grid has 2 to 8 bits, got 9"),
        (["--bits=two"], "--bits=two is not a list of whole numbers"),
        (["--seeds="], "--seeds= is not a list of whole numbers"),
        (["--methods=hqq"], "unknown baseline 'hqq': one of rtn, gptq, awq, omniquant, qat, autoround"),
        (["--set=qat.epochs"], "--set=qat.epochs is not METHOD.FIELD=VALUE or METHOD@BITS.FIELD=VALUE"),
        (["--set=qat.epochs=2.5"], "--set=qat.epochs=2.5: '2.5' is no int"),
        (["--set=qat.rate=1"], "--set=qat.rate=1: qat has the fields weight_lr, scale_lr, epochs"),
        (["--set=qat@5.epochs=1"], "--set=qat@5.epochs=1: qat@5 is not among the models to make"),
        (["--methods=rtn", "--set=qat.epochs=1"], "--set=qat.epochs=1: qat is not among the models to make"),
        (["--set=qat.weight_lr=-1"], "qat.weight_lr=-1 must be at least 0"),
        (["--recipes=nowhere.json"], "no results 'nowhere.json'"),
        (["--text=valid"], "--text=valid is not NAME=SOURCE or NAME:WINDOWS=SOURCE"),
        (["--text=valid:many=c4"], "--text=valid:many=c4 is not NAME=SOURCE or NAME:WINDOWS=SOURCE"),
        (["--text=valid=c4"], "--text=valid=c4: there is another text of this name"),
        (
            ["--config.evaluation.window_length=1024"],
            "window_length=1024 exceeds the model's context of 512",
        ),
        (["--resume", "--overwrite"], "give one of --resume and --overwrite"),
        (["--config.quant.group_size=5"], "group size 5 does not divide the 64 input features"),
        (["--save=README.md"], "--save: 'README.md' is no folder"),
        (["--save=README.md/models"], "--save: 'README.md' is no folder"),
        (["--config.calibration.windows=4000"], "windows of 64 tokens, not 4000"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(
    call_script, arguments, tmp_path: Path, options: list[str], message: str
):
    result = call_script("baselines", *arguments, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "rows.json").exists()


def test_a_table_in_the_way_is_kept(call_script, arguments: list[str], tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text("precious")
    for option, message in ([], "exists: --resume adds"), (["--resume"], "is not JSON"):
        result = call_script("baselines", *arguments, "--methods=rtn", *option)
        assert result.returncode == 2 and message in result.stderr
    assert path.read_text() == "precious"


def test_saved_models_are_the_ones_that_were_scored(call_script, arguments: list[str], shared_data, tmp_path: Path):
    config, params, _ = load_dense(shared_data / "stories260K")
    tokenizer = Tokenizer(Backend(models.BPE(vocab={letter: i for i, letter in enumerate("abc")}, merges=[])))
    save_hf(tmp_path / "source", config, params, tokenizer=tokenizer)
    made = [*arguments, f"--config.model.source={tmp_path}/source", "--methods=rtn,omniquant", "--bits=2,3"]
    made += ["--seeds=0,4", "--set=omniquant.epochs=1", f"--save={tmp_path}/models"]
    first = call_script("baselines", *made, "--elsewhere")
    assert first.returncode == 0, first.stderr
    rows = read(tmp_path / "rows.json")
    own = {}
    for row in rows:
        if row["bits"] == row["calibrated_bits"]:
            parts = [row["method"], row["bits"], row["seed"]]
            own["-".join(str(part) for part in parts if part is not None)] = row["perplexity"]
    expected = {"unquantized", "rtn-2", "rtn-3"} | {f"omniquant-{bits}-{seed}" for bits in (2, 3) for seed in (0, 4)}
    assert set(own) == expected == {folder.name for folder in (tmp_path / "models").iterdir()}
    assert len(set(own.values())) == len(own)  # a model under another's name would show
    windows = np.load(tmp_path / "valid.npy")
    for name, perplexity in own.items():
        model = load_model(tmp_path / "models" / name)
        assert model.tokenizer.encode("cab").tolist() == [2, 0, 1]
        assert {leaf.dtype for leaf in jax.tree.leaves(model.variables)} == {np.dtype(np.float32)}
        assert evaluate_perplexity(model, windows, None, batch_size=4).perplexity == pytest.approx(perplexity, rel=1e-6)

    # What is there is left alone; a folder that is missing is filled again and adds no row.
    weights = tmp_path / "models" / "rtn-3" / "model.safetensors"
    before, lost = weights.stat().st_mtime_ns, tmp_path / "models" / "rtn-2"
    bytes_lost = (lost / "model.safetensors").read_bytes()
    lost.rename(tmp_path / "lost")
    again = call_script("baselines", *made, "--elsewhere", "--resume")
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert (lost / "model.safetensors").read_bytes() == bytes_lost
    assert weights.stat().st_mtime_ns == before and read(tmp_path / "rows.json") == rows


def test_a_folder_in_the_way_is_named_before_any_work(call_script, arguments: list[str], tmp_path: Path):
    folder = tmp_path / "models" / "rtn-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    made = [*arguments, "--methods=rtn", "--bits=2,3", f"--save={tmp_path}/models"]
    for option in ([], ["--resume"]):  # it has no rows: whose it is, nobody knows
        result = call_script("baselines", *made, *option)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: --save: '{folder}' is in the way") and result.stderr.count("\n") == 1
    assert not (tmp_path / "rows.json").exists() and len(list((tmp_path / "models").iterdir())) == 1
    several = [*arguments, "--methods=qat", "--bits=2", "--set=qat.epochs=1,2", f"--save={tmp_path}/models"]
    result = call_script("baselines", *several)
    assert result.returncode == 2 and f"two models would be written to '{tmp_path}/models/qat-2-0'" in result.stderr
