"""Epochs that outlive a kill: what is saved, what a run continues from, and what is damaged or cannot be removed."""

import pytest

from mobiquant_jax.calibration import epochs as epochs_module
from mobiquant_jax.calibration.epochs import SavedEpochs
from mobiquant_jax.calibration.run_dir import TUNING, RunDir

DAMAGED = "damaged"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """``epochs -> SavedEpochs`` whose states are the numbers of the epochs they have seen, in text files."""
    run = RunDir(path=tmp_path)

    def save(path, state):
        path.mkdir(parents=True)
        (path / "state").write_text(" ".join(map(str, state)))

    def load(path):
        text = (path / "state").read_text()
        if text == DAMAGED:
            run.remove(path)
            return None
        return [int(number) for number in text.split()]

    monkeypatch.setattr(epochs_module, "save_tree", save)

    def make(epochs, save_seconds=0.0):
        return SavedEpochs(run=run, stage=TUNING, epochs=epochs, save_seconds=save_seconds, load=load)

    return make


def run_all(stage):
    """The final state, and what was reported."""
    reports = []
    state = stage.run_all(
        list, lambda state, number: ([*state, number], {"n": number}), lambda *report: reports.append(report)
    )
    return state, [(done, record["n"]) for done, _, record in reports]


def saved(stage):
    return sorted(entry.name for entry in (stage.run.path / TUNING).glob("*"))


def test_a_stage_without_epochs_is_its_start(stage):
    assert run_all(stage(0)) == ([], [])


def test_the_last_state_alone_is_kept_and_a_run_continues_from_it(stage):
    assert run_all(stage(2)) == ([0, 1], [(1, 0), (2, 1)])
    assert saved(stage(2)) == ["002"]
    assert run_all(stage(4)) == ([0, 1, 2, 3], [(3, 2), (4, 3)])
    assert run_all(stage(4)) == ([0, 1, 2, 3], [])


def test_nothing_is_saved_before_its_time(stage):
    assert run_all(stage(3, save_seconds=1e9))[0] == [0, 1, 2]
    assert saved(stage(3)) == []


def test_a_damaged_state_is_computed_again_and_a_stray_file_is_none(stage):
    run_all(stage(2))
    (stage(2).run.saved(TUNING, 2) / "state").write_text(DAMAGED)
    (stage(2).run.path / TUNING / "007").write_text("not a state")
    assert run_all(stage(2)) == ([0, 1], [(1, 0), (2, 1)])


def test_a_damaged_state_that_cannot_be_removed_ends_the_run(stage, monkeypatch):
    run_all(stage(1))
    (stage(1).run.saved(TUNING, 1) / "state").write_text(DAMAGED)

    def refuse(path, **kwargs):
        raise PermissionError(f"cannot remove '{path}'")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(PermissionError, match="cannot remove"):
        run_all(stage(1))
