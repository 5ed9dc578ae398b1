"""The folder of a run: made whole or not at all, continued only as what it is."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mobiquant_jax.calibration.channel_scales import ChannelScales
from mobiquant_jax.calibration.run_dir import FINE, ROUTED, ROUTER, SLICE, TUNING, RunDir, open_run

RECORD = {"config": {"quant.group_size": 64, "calibration.budgets": (2.0, 8.0)}, "model": "m", "data": "d", "made": 1}


def opened(path, record=RECORD, *, resume=False, overwrite=False):
    return open_run(path, record, resume=resume, overwrite=overwrite)


def fails(message, path, *args, **kwargs):
    before = {entry: entry.read_bytes() for entry in Path(path).parent.rglob("*") if entry.is_file()}
    with pytest.raises(ValueError) as error:
        opened(path, *args, **kwargs)
    assert str(error.value) == message
    assert {entry: entry.read_bytes() for entry in Path(path).parent.rglob("*") if entry.is_file()} == before


def test_a_new_run_records_what_was_asked_for(tmp_path):
    run = opened(tmp_path / "runs" / "one")
    assert json.loads((run.path / "run.json").read_text()) == json.loads(json.dumps(RECORD))
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["one"]
    assert [entry.name for entry in run.path.iterdir()] == ["run.json"]
    assert run == opened(run.path, resume=True)  # tuples and lists are the same in JSON


def test_an_empty_folder_and_a_link_to_one_are_used(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    opened(tmp_path / "run")
    assert (tmp_path / "disk" / "run.json").is_file()
    (tmp_path / "disk" / "blocks").mkdir()
    opened(tmp_path / "run", overwrite=True)
    assert [entry.name for entry in (tmp_path / "disk").iterdir()] == ["run.json"]
    assert (tmp_path / "run").is_symlink()


def test_resume_starts_a_run_where_there_is_none(tmp_path):
    run = opened(tmp_path / "new", resume=True)
    assert run.path.is_dir() and not run.continued
    assert opened(run.path, resume=True).continued
    assert not opened(run.path, overwrite=True).continued


def test_overwrite_starts_over(tmp_path):
    run = opened(tmp_path / "run")
    run.log({"block": 0})
    opened(run.path, RECORD | {"model": "other"}, overwrite=True)
    assert [entry.name for entry in run.path.iterdir()] == ["run.json"]
    assert json.loads((run.path / "run.json").read_text())["model"] == "other"


def test_what_is_in_the_way_is_named_and_kept(tmp_path):
    path = tmp_path / "run"
    fails("run_dir is empty: give --config.run_dir=FOLDER", "")
    fails("give one of --resume and --overwrite", path, resume=True, overwrite=True)
    opened(path)
    fails(f"'{path}' holds a run: --resume continues it, --overwrite starts over", path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    (tmp_path / "notes").write_text("precious")
    for flags in ({}, dict(resume=True), dict(overwrite=True)):
        message = "holds files but no calibration run: choose another run_dir"
        fails(f"'{tmp_path / 'photos'}' {message}", tmp_path / "photos", **flags)
        message = "is a file, not a folder: choose another run_dir"
        fails(f"'{tmp_path / 'notes'}' {message}", tmp_path / "notes", **flags)


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        opened(tmp_path / "file" / "run")

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device", str(self))

    run = opened(tmp_path / "run")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        opened(tmp_path / "other")
    with pytest.raises(OSError, match="No space left"):
        opened(run.path, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "run"]
    assert (run.path / "run.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="n"), "was calibrated with another model: --overwrite starts over"),
        (dict(data="e"), "was calibrated with another data: --overwrite starts over"),
        (
            dict(config=RECORD["config"] | {"quant.group_size": 32}),
            "was started with quant.group_size=64, not 32: --overwrite starts over",
        ),
        (
            dict(config=RECORD["config"] | {"calibration.seed": 1}),
            "was started with calibration.seed=None, not 1: --overwrite starts over",
        ),
        (
            dict(config={"quant.group_size": 64}, model="n"),
            "was started with calibration.budgets=[2.0, 8.0], not None: --overwrite starts over",
        ),
    ],
)
def test_resume_refuses_another_run_and_says_what_differs(tmp_path, change, message):
    path = opened(tmp_path / "run").path
    fails(f"'{path}' {message}", path, RECORD | change, resume=True)
    opened(path, RECORD | {"made": 2}, resume=True)  # the rest may differ


@pytest.mark.parametrize("content", ["", '{"config": ', "[1]"])
def test_a_damaged_record_is_named(tmp_path, content):
    path = opened(tmp_path / "run").path
    (path / "run.json").write_text(content)
    with pytest.raises(ValueError) as error:
        opened(path, resume=True)
    assert str(path / "run.json") in str(error.value) and "--overwrite starts over" in str(error.value)


def test_unfinished_epochs_do_not_count_and_all_of_it_is_removed_at_the_end(tmp_path):
    run = opened(tmp_path / "run")
    assert run.saved_epochs(TUNING) == 0
    left_by_a_kill = [run.path / TUNING / "003.orbax-checkpoint-tmp", run.path / ".checkpoint.partial-77"]
    first, second = (run.saved(TUNING, epochs) for epochs in (1, 2))
    states = (run.saved(stage, 5) for stage in (ROUTED, f"{SLICE}/4", FINE, ROUTER))
    for folder in (run.block(0), first, second, *states, run.checkpoint, *left_by_a_kill):
        folder.mkdir(parents=True)
    assert [run.saved_epochs(stage) for stage in (TUNING, ROUTER, f"{SLICE}/4")] == [2, 5, 5]
    run.remove(first)
    assert not first.exists() and second.exists()
    run.log({"block": 0})
    run.log({"block": 1})
    run.remove_intermediate()
    assert sorted(entry.name for entry in run.path.iterdir()) == ["checkpoint", "metrics.jsonl", "run.json"]
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    peaks = [(row := json.loads(line)).pop("peak_gb") for line in lines]
    assert [json.loads(line)["block"] for line in lines] == [0, 1] and row == {"block": 1, "peak_device_gb": None}
    assert 0.05 < peaks[0] <= peaks[1]


def test_channel_scales_come_back_and_a_damaged_file_is_named(tmp_path):
    run = opened(tmp_path / "run")
    assert run.load_scales() == []
    rng = np.random.default_rng(0)
    blocks = [ChannelScales(*(rng.normal(size=n).astype(np.float32) for n in (4, 4, 6))) for _ in range(3)]
    for count in (1, 3):
        run.save_scales(blocks[:count])
        found = run.load_scales()
        assert len(found) == count and all(isinstance(one, ChannelScales) for one in found)
        for one, wanted in zip(found, blocks, strict=False):
            for leaf, wanted_leaf in zip(one, wanted, strict=True):
                np.testing.assert_array_equal(leaf, wanted_leaf)
    assert sorted(entry.name for entry in run.path.iterdir()) == ["run.json", "scales.npz"]
    run.scales.write_bytes(run.scales.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"^'.*scales\.npz' is damaged: --overwrite starts over$"):
        run.load_scales()


def test_an_event_file_holds_the_numbers_of_the_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    run = open_run(tmp_path / "run", RECORD, resume=False, overwrite=False, tensorboard=True)
    assert not (run.path / "events").exists()
    run.log({"block": 3, "before": 0.25, "note": "as told"})
    run.log({"tuning_epoch": 1, "divergence": 0.5, "healthy": True})
    run.events.close()
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2
    (file,) = (run.path / "events").iterdir()
    content, found = file.read_bytes(), []
    while content:  # records: length, its checksum, the message, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[12 + length + 4 :]
    peaks = [found.pop(4), found.pop(1)]
    assert found == [("block/before", 3, 0.25), ("tuning_epoch/divergence", 1, 0.5), ("tuning_epoch/healthy", 1, 1.0)]
    assert [peak[:2] for peak in peaks] == [("tuning_epoch/peak_gb", 1), ("block/peak_gb", 3)]


def test_an_event_file_without_the_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--tensorboard needs tensorboardX: pip install 'mobiquant_jax\[tensorboard"):
        open_run(tmp_path / "run", RECORD, resume=False, overwrite=False, tensorboard=True)
    assert not list(tmp_path.iterdir())


def test_paths():
    run = RunDir(path=Path("r"))
    assert (run.block(7), run.saved(TUNING, 12)) == (Path("r/blocks/007"), Path("r/tuning/012"))


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_thresholds_come_back_and_a_damaged_file_is_named(tmp_path, content):
    """The last one is an array of another shape."""
    run = RunDir(path=tmp_path)
    pairs = np.array([[2.0, np.inf], [3.0, -5.5]])
    run.save_thresholds(pairs)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thresholds.npy"]
    np.testing.assert_array_equal(run.load_thresholds(), pairs)
    np.save(run.thresholds, pairs[:, 0]) if content is None else run.thresholds.write_bytes(content)
    with pytest.raises(ValueError, match=r"^'.*thresholds\.npy' is damaged: --overwrite starts over$"):
        run.load_thresholds()
