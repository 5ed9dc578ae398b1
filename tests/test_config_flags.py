"""The command line as a user meets it: a script in a process of its own, or in this one where cases are many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = '''"""Prints what it was given."""
from absl import flags
from mobiquant_jax.config_flags import define_config, run

CONFIG = define_config()
COUNT = flags.DEFINE_integer("count", 3, "how many")
FAIL = flags.DEFINE_string("fail", "", "error to raise")

def main(argv):
    if FAIL.value:
        raise {"value": ValueError, "file": FileNotFoundError, "not": NotImplementedError,
               "bug": KeyError}[FAIL.value]("first line\\n  second line")
    config = CONFIG.value
    print(config.quant.group_size, config.evaluation.bits, config.model.dither, COUNT.value, len(argv))

if __name__ == "__main__":
    run(main)
'''
CONFIG = """
from mobiquant_jax.default_config import default_config

def get_config():
    config = default_config()
    config.quant.group_size = 32
    return config
"""


# ml_collections loads config files in a way that Python means to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the script and its config lie."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def script(folder: Path):
    """``(*arguments) -> CompletedProcess`` in a process of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "script.py", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    return call


@pytest.fixture
def called(folder: Path, call_file, monkeypatch):
    """`script` in this process."""
    monkeypatch.chdir(folder)
    return lambda *arguments: call_file("script.py", *arguments)


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The message of a call that failed in the promised form: exit code 2, one line on stderr, nothing on stdout."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_fields_are_overridden_with_their_types(script):
    result = script(
        "--config=config.py", "--config.quant.group_size=64", "--config.evaluation.bits=2,4.5", "--config.model.dither"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "64 (2, 4.5) True 3 1\n"


def test_the_file_is_used_where_nothing_is_overridden(called):
    result = called("--config", "config.py", "--count", "5", "--noconfig.model.dither")
    assert result.stdout == "32 (2.0, 2.5, 3.0, 4.0, 6.0, 8.0) False 5 1\n", result.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.quant.grop_size=64", "unknown config field 'quant.grop_size' (nearest: 'quant.group_size')"),
        ("--config.group_size=64", "unknown config field 'group_size' (nearest: 'quant.group_size')"),
        ("--config.calibration.window=1", "unknown config field 'calibration.window' (nearest: 'calibration.windows')"),
        ("--cuont=4", "unknown flag '--cuont' (nearest: '--count')"),
        ("stray", "unexpected argument 'stray': every option is written --NAME=VALUE"),
    ],
)
def test_a_typo_names_the_nearest(called, argument: str, message: str):
    assert error_line(called("--config=config.py", argument)) == message


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.quant.group_size=sixty", "'sixty'"),
        ("--config.quant.group_size=6.5", "'6.5'"),
        ("--config.evaluation.bits=2,four", "2,four"),
        ("--config.model.dither=perhaps", "'perhaps'"),
        ("--config.calibration.temperature=warm", "'warm'"),
        ("--config.quant=3", "'quant' is a section"),
        ("--count=many", "'many'"),
    ],
)
def test_a_wrong_type_names_the_value(called, argument: str, named: str):
    assert named in error_line(called("--config=config.py", argument))


def test_a_missing_or_broken_config_file_is_named(called, tmp_path: Path):
    assert error_line(called("--config=nowhere.py")) == "no config file 'nowhere.py'"
    assert "--config=FILE.py is required" in error_line(called("--count=1"))
    assert "before a value for --config" in error_line(called("--config.quant.group_size=4", "--config=config.py"))
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    assert (
        error_line(called("--config=broken.py")) == "config file 'broken.py' fails: ZeroDivisionError: division by zero"
    )
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    assert "returns dict, not a ConfigDict" in error_line(called("--config=plain.py"))


@pytest.mark.parametrize("kind", ["value", "file", "not"])
def test_an_error_of_the_user_is_one_line(called, kind: str):
    assert error_line(called("--config=config.py", f"--fail={kind}")) == "first line second line"


def test_tracebacks_are_for_bugs_and_for_debug(script):
    assert error_line(script("--config=config.py", "--fail=value")) == "first line second line"
    debugged = script("--config=config.py", "--fail=value", "--debug")
    assert debugged.returncode == 2
    assert "Traceback" in debugged.stderr and debugged.stderr.endswith("error: first line second line\n")
    bug = script("--config=config.py", "--fail=bug")
    assert bug.returncode == 1 and "KeyError" in bug.stderr


def test_help_lists_the_flags_and_the_fields_of_the_file(script):
    result = script("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Prints what it was given.")
    assert "--count: how many (default: '3')" in result.stdout and "--debug" in result.stdout
    assert len(result.stdout.splitlines()) < 20
    fields = script("--config=config.py", "--help").stdout
    assert "--config.quant.group_size=32" in fields and "--config.run_dir=" in fields
