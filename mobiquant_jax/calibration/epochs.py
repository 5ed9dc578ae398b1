"""Epochs of training that outlive a kill: the state is saved now and then, and a run continues from the last save."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobiquant_jax import distributed
from mobiquant_jax.calibration.run_dir import RunDir
from mobiquant_jax.io.checkpoint import DamagedTree, load_tree, save_tree


@dataclass(frozen=True, kw_only=True)
class SavedEpochs:
    """The epochs of one stage of a run.

    Attributes:
        run: the run's folder.
        stage: name of the stage, and of its folder in the run's.
        epochs: how many there are.
        save_seconds: the state is saved after the first epoch that ends so long after the last save.
        load: reads a saved state, or removes a damaged one and returns None.
    """

    run: RunDir
    stage: str
    epochs: int
    save_seconds: float
    load: Callable[[Path], Any]

    def run_all(
        self,
        start: Callable[[], Any],
        epoch: Callable[[Any, int], tuple[Any, dict[str, Any]]],
        report: Callable[[int, float, dict[str, Any]], None],
    ) -> Any:
        """Runs the epochs that are left.

        Args:
            start: makes the state before the first epoch.
            epoch: ``(state, number) -> (state, what to log)``.
            report: is told of (epochs done, seconds of the last one, what was logged).

        Returns:
            The state after the last epoch.
        """
        state = None
        while state is None and (first := distributed.from_main(self.run.saved_epochs(self.stage))):
            state = self.load(self.run.saved(self.stage, first))
        if state is None:
            state = start()
        saved, saved_at = first, time.perf_counter()
        for number in range(first, self.epochs):
            began = time.perf_counter()
            state, record = epoch(state, number)
            # One process's clock decides for all.
            if distributed.from_main(int(time.perf_counter() - saved_at >= self.save_seconds)):
                save_tree(self.run.saved(self.stage, number + 1), state)
                self.run.remove(self.run.saved(self.stage, saved))
                saved, saved_at = number + 1, time.perf_counter()
            seconds = time.perf_counter() - began
            self.run.log({f"{self.stage}_epoch": number, **record, "seconds": round(seconds, 3)})
            report(number + 1, seconds, record)
        return state


def load_or_remove(run: RunDir, path: Path, like: Any, on_damaged: Callable[[str], None]) -> Any:
    """A saved tree, or None where there is none, or a damaged one, which is removed.

    Args:
        run: the run's folder.
        path: of the tree in it.
        like: shapes, types and shardings.
        on_damaged: is told what is wrong with a damaged one.
    """
    if not distributed.from_main(int(path.is_dir())):
        return None
    try:
        return load_tree(path, like)
    except DamagedTree as error:
        on_damaged(str(error))
        run.remove(path)
        return None
