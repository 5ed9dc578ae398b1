"""Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from mobiquant_jax.provenance import short_commit


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: its head, a rule, and a line a row."""
    return [_line(head), f"|{'---|' * len(head)}", *map(_line, rows)]


def where_from(sessions: Sequence[Mapping[str, Any]]) -> str:
    """Commits, devices and versions of JAX that the sessions of a file of results ran with, each once."""
    commits = ", ".join(dict.fromkeys(short_commit(session["commit"]) for session in sessions))
    devices = ", ".join(dict.fromkeys(device for session in sessions for device in session["devices"]))
    versions = ", ".join(dict.fromkeys(f"jax {session['versions']['jax']}" for session in sessions))
    return f"at {commits}: {devices}; {versions}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
