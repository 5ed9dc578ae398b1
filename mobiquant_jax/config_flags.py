"""The command line of every script: ``--config=FILE.py`` with overrides, plain absl flags, and one-line errors.

A script defines its flags with absl, calls :func:`define_config` if it takes a config file, and ends with
``run(main)``. Nothing a user can get wrong on the command line prints a traceback unless ``--debug`` is given.
"""

import contextlib
import difflib
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections import config_flags as ml_config_flags

FLAGS = flags.FLAGS
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# A flag defined through this module is the calling script's own, so that --help lists it there.
flags.disclaim_key_flags()


def define_config(default: str | None = None) -> flags.FlagHolder:
    """Defines the flag ``--config=FILE.py`` together with its overrides ``--config.section.field=VALUE``.

    Args:
      default: path of the config file to use when the flag is absent; None makes the flag required.

    Returns:
      The absl holder whose ``.value`` is the locked ``ConfigDict`` after :func:`run` has parsed the command line.
    """
    return ml_config_flags.DEFINE_config_file(
        "config", default, "a file of configs/; --config.SECTION.FIELD=VALUE overrides any field of it"
    )


def load_config(path: str | Path) -> ConfigDict:
    """Runs ``get_config()`` of one config file.

    Args:
      path: a Python file which defines ``get_config() -> ConfigDict``.

    Returns:
      The config, not locked.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file fails to run, or does not define ``get_config() -> ConfigDict``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file '{path}'")
    spec = importlib.util.spec_from_file_location("mobiquant_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"config file '{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ValueError(f"config file '{path}' fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of '{path}' returns {type(config).__name__}, not a ConfigDict")
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Lists the fields of a config by their dotted names.

    Args:
      config: sections may be nested to any depth.

    Returns:
      {"quant.group_size": 128, ...}, sorted by section; the values are shared with the config.
    """
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= {f"{name}.{inner}": inner_value for inner, inner_value in flatten(value).items()}
        else:
            fields[name] = value
    return fields


def whole_numbers(flag: str, values: Sequence[str]) -> list[int]:
    """The numbers of a list flag; a ValueError names the flag unless all are whole, and there is one."""
    if not values or not all(value.isdecimal() for value in values):
        raise ValueError(f"--{flag}={','.join(values)} is not a list of whole numbers")
    return [int(value) for value in values]


def run(main: Callable[[list[str]], object]) -> None:
    """Parses the command line, calls ``main(argv)`` and exits; the last line of every script.

    A ``ValueError``, ``OSError`` or ``NotImplementedError``, like anything wrong with the flags, becomes one line
    ``error: ...`` on stderr and exit code 2. ``--debug`` prints the traceback before it.

    Args:
      main: called with the program name alone, ``[argv[0]]``, once ``absl.flags.FLAGS`` is parsed.

    Raises:
      SystemExit: always, with the exit code.
    """
    if "debug" not in FLAGS:
        flags.DEFINE_boolean("debug", False, "print the traceback of an error")
    argv = sys.argv
    with one_line_errors(debug="--debug" in argv):
        if any(re.fullmatch(r"--?(help(short|full)?|h|\?)", argument) for argument in argv[1:]):
            print(_help(argv, inspect.getmodule(main)))
            sys.exit(0)
        _parse(argv)
        main(argv[:1])
    sys.exit(0)


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Turns what a user can get wrong into one line ``error: ...`` on stderr and exit code 2.

    Args:
      debug: print the traceback before it.

    Yields:
      Nothing; a ``ValueError``, ``OSError`` or ``NotImplementedError`` in the block becomes a ``SystemExit``.
    """
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        if debug:
            traceback.print_exc()
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _parse(argv: Sequence[str]) -> None:
    """Fills ``FLAGS``; every mistake is a ValueError or FileNotFoundError that names the argument."""
    if "config" in FLAGS:
        _check_config_names(argv, FLAGS["config"].default)
    try:
        positional = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        known = [name for name in FLAGS if FLAGS[name] in FLAGS.get_key_flags_for_module(argv[0])]
        nearest = _nearest(error.flagname, known)
        raise ValueError(f"unknown flag '--{error.flagname}' (nearest: '--{nearest}')") from error
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if "config" in FLAGS:
        _check_config_tuples(FLAGS["config"])
    if positional:
        raise ValueError(f"unexpected argument {positional[0]!r}: every option is written --NAME=VALUE")


def _check_config_names(argv: Sequence[str], default: str | None) -> None:
    """Checks the config file and the names of the overridden fields before absl meets them."""
    path = _config_path(argv) or default
    if path is None:
        raise ValueError("--config=FILE.py is required, e.g. --config=configs/smollm2_135m.py")
    known = list(flatten(load_config(path)))
    for argument in argv[1:]:
        override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not override or override[1] in known:
            continue
        if inner := [name for name in known if name.startswith(f"{override[1]}.")]:
            raise ValueError(f"config field '{override[1]}' is a section: set one of its fields, such as '{inner[0]}'")
        raise ValueError(f"unknown config field '{override[1]}' (nearest: '{_nearest(override[1], known)}')")


def _check_config_tuples(config_flag: flags.Flag) -> None:
    """Refuses text among the overrides of a tuple of numbers, which ml_collections lets through."""
    defaults = flatten(load_config(ml_config_flags.get_config_filename(config_flag)))
    for name, value in ml_config_flags.get_override_values(config_flag).items():
        if isinstance(defaults[name], tuple) and all(isinstance(v, int | float) for v in defaults[name]):
            if not all(isinstance(v, int | float) for v in value):
                raise ValueError(f"flag --config.{name}: wants numbers like {defaults[name]}, got {value}")


def _config_path(argv: Sequence[str]) -> str | None:
    """The config file named on the command line, as ``--config=FILE`` or ``--config FILE``."""
    for argument, following in itertools.pairwise([*argv, None]):
        if argument and (match := re.fullmatch(r"--?config(?:=(.*))?", argument)):
            return match[1] if match[1] is not None else following
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like a mistyped one; the last part counts most, since sections are often left out."""

    def likeness(candidate: str) -> float:
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return last + difflib.SequenceMatcher(None, name, candidate).ratio()

    return max(known, key=likeness)


def _help(argv: Sequence[str], module: ModuleType | None) -> str:
    """The script's docstring, its flags and, when a config file is given, that file's fields."""
    lines = [inspect.cleandoc((module and module.__doc__) or argv[0]), "", "flags:"]
    for flag in FLAGS.get_key_flags_for_module(argv[0]):
        default = "" if flag.default is None or flag.boolean else f" (default: {flag.default_as_str})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    if "config" in FLAGS and (path := _config_path(argv)):
        lines += ["", f"fields of {path}, and their values there:"]
        lines += [f"  --config.{name}={value}" for name, value in flatten(load_config(path)).items()]
    return "\n".join(lines)
