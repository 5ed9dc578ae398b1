"""lm-eval's command line with the model ``mobiquant`` and the local tasks.

    python -m mobiquant_jax.evaluation.tasks run --model mobiquant --model_args pretrained=CHECKPOINT,bits=2.5 \
        --tasks local_zero_shot --task_data FOLDER --batch_size 16 --output_path results

Everything is lm-eval's own, but for two options: ``--task_data FOLDER`` holds the JSON lines of the tasks ``local_*``,
and ``--debug`` prints the traceback of an error.
"""

import argparse
import json
import sys
from pathlib import Path

from mobiquant_jax.config_flags import one_line_errors
from mobiquant_jax.evaluation.tasks import require_lm_eval
from mobiquant_jax.evaluation.tasks.documents import DEFINITIONS

COMMANDS = ("run", "ls", "validate")


def main(arguments: list[str]) -> None:
    """Registers the model and hands over to lm-eval.

    Args:
        arguments: of the command line, without the program's name.

    Raises:
        ValueError: lm-eval is not installed, or a wrong value.
        FileNotFoundError: there is no such folder, file or model.
    """
    require_lm_eval()
    # After the check, so that what to install is said in one line.
    from lm_eval.__main__ import cli_evaluate

    from mobiquant_jax.evaluation.tasks.runner import register

    register()
    program = sys.argv
    sys.argv = ["lm-eval", *lm_eval_arguments(arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = program


def lm_eval_arguments(arguments: list[str]) -> list[str]:
    """The arguments as lm-eval takes them: with the local tasks' definitions, and their folder as metadata.

    Args:
        arguments: of this program.

    Raises:
        ValueError: ``--task_data`` without the command ``run``.
        FileNotFoundError: there is no such folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task_data")
    parser.add_argument("--debug", action="store_true")
    ours, rest = parser.parse_known_args(arguments)
    command = rest[0] if rest else None
    if ours.task_data is None:
        data = []
    elif command != "run":
        raise ValueError(f"--task_data belongs to the command 'run', not to {command!r}")
    elif not Path(ours.task_data).expanduser().is_dir():
        raise FileNotFoundError(f"no folder '{ours.task_data}' for --task_data")
    else:
        data = ["--metadata", json.dumps({"task_data": ours.task_data})]
    if command not in COMMANDS:
        return rest
    # First, so that the user's own --include_path wins.
    return [command, "--include_path", str(DEFINITIONS), *rest[1:], *data]


if __name__ == "__main__":
    with one_line_errors(debug="--debug" in sys.argv):
        main(sys.argv[1:])
