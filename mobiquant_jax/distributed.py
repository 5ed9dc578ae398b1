"""Several processes as one job: who they are, who speaks, and what happens when one of them is missing.

Every process runs the same program on its own devices. `initialize` comes before anything that touches a device; it
takes the processes from flags, from Slurm, from an indexed Kubernetes job or from a TPU pod. Only process 0 writes
files and prints; all of them reach each `barrier`.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

# Flags defined here are the calling script's own, so that --help lists them there.
flags.disclaim_key_flags()

CONNECT_SECONDS = 45  # how long processes wait for each other at the start
# After so long without a sign of life a process counts as dead, and one that has ended waits so long for the others:
# then all end.
HEARTBEAT_SECONDS = 20
EXIT_MISSING = 2
EXIT_LOST = 3

# Where a scheduler says which process this is.
_RANKS = ("SLURM_PROCID", "JOB_COMPLETION_INDEX")


def define_flags() -> Callable[[], None]:
    """Defines ``--coordinator``, ``--processes`` and ``--process``.

    Returns:
        A function that calls `initialize` with their values, for ``main`` to call first.
    """
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where several processes are one job"
    )
    processes = flags.DEFINE_integer("processes", None, "how many processes there are; known on Slurm and TPU pods")
    process = flags.DEFINE_integer("process", None, "number of this one, from 0; known on Slurm, Kubernetes, TPU pods")
    return lambda: initialize(coordinator.value, processes.value, process.value)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of a job; nothing where there is only one.

    Processes other than 0 stop printing. One that waits in vain for the others, or whose computation with them fails,
    ends with one line. Where another one died before they met in a collective, the runtime notices by its heartbeats,
    `HEARTBEAT_SECONDS` later, and aborts all of them itself.

    Args:
        coordinator: ``HOST:PORT`` of process 0; None where the scheduler tells.
        processes: how many there are.
        process: number of this one; None where the scheduler tells.
        environ: environment variables.

    Raises:
        ValueError: a number without its counterpart, or one out of range.
    """
    arguments = job_arguments(coordinator, processes, process, environ)
    if arguments is None:
        return
    where = arguments.get("coordinator_address", "the coordinator that the scheduler names")
    count = arguments.get("num_processes", "the job's")
    # The runtime itself would abort with a stack trace of its own.
    watchdog = threading.Timer(CONNECT_SECONDS, _give_up, [f"not all of {count} processes met at {where}"])
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    finally:
        watchdog.cancel()
    if jax.process_count() > 1:
        sys.excepthook = _end_alone
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def job_arguments(
    coordinator: str | None, processes: int | None, process: int | None, environ: Mapping[str, str]
) -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is told, or None for a job of one process.

    Raises:
        ValueError: a number without its counterpart, or one out of range.
    """
    if coordinator is not None or processes is not None or process is not None:
        if process is None:
            process = next((int(environ[name]) for name in _RANKS if name in environ), None)
        given = {"coordinator": coordinator, "processes": processes, "process": process}
        for name, value in given.items():
            if value is None:
                beside = ", ".join(f"--{other}" for other in given if given[other] is not None)
                raise ValueError(f"--{name} is missing beside {beside}")
        assert coordinator is not None and processes is not None and process is not None
        if not 0 <= process < processes:
            raise ValueError(f"--process={process} is outside 0..{processes - 1}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator={coordinator!r} is not HOST:PORT")
        return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ:
        return {"cluster_detection_method": "slurm"}
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return {"cluster_detection_method": "k8s"}
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    return None


def is_main() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_main(value: int) -> int:
    """Process 0's value, in every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def on_main(name: str, action: Callable[[], object]) -> None:
    """Runs an action in process 0 while the others wait; its failure is everybody's.

    Args:
        name: of the action.
        action: writes files, say.

    Raises:
        OSError: the action raised it, or anything else where this is another process.
    """
    failure: BaseException | None = None
    if is_main():
        try:
            action()
        except Exception as error:
            failure = error
    failed = from_main(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise OSError(f"{name} failed in process 0, which says why")


def fetch(tree: Any) -> Any:
    """The arrays of a tree on the host of every process, whole, wherever their parts lie."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def partial_name(path: Path) -> Path:
    """The same hidden name in every process, for what is to become ``path`` when it is complete."""
    return path.with_name(f".{path.name}.partial-{from_main(os.getpid())}")


def _end_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends this process at once where a computation over all of them fails, as it does when another one is gone.

    To leave in good order it would wait for the other, and be aborted with a stack trace of the runtime's.
    """
    if not issubclass(kind, jax.errors.JaxRuntimeError):
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split())[:200]
    sys.stdout.flush()
    print(f"error: a computation failed, or another process is gone: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


def _give_up(reason: str) -> None:
    print(f"error: {reason} within {CONNECT_SECONDS} s", file=sys.stderr, flush=True)
    os._exit(EXIT_MISSING)
