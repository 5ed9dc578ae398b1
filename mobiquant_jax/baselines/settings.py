"""Settings of a method as pytrees, so that models which differ in numbers only are made together by one program.

Fields that enter the mathematics as numbers (rates, weights) are leaves; those that shape the program (steps, names)
are static. Settings with the same static fields have the same tree structure and can be stacked.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Settings = TypeVar("Settings")


def static(default: Any) -> Any:
    """A dataclass field, with a default, that is compiled in."""
    return field(default=default, metadata={"static": True})


def check_number(name: str, value: Any, *, least: float, most: float = float("inf")) -> None:
    """Raises ValueError, naming the field, unless ``least <= value <= most``.

    Stacked or traced settings pass: each was checked when it was made.
    """
    if isinstance(value, int | float) and not least <= value <= most:
        limits = f"at least {least:g}" if most == float("inf") else f"between {least:g} and {most:g}"
        raise ValueError(f"{name}={value:g} must be {limits}")


def program(settings: Any) -> Any:
    """What decides the compiled program: the settings' class and static fields, hashable."""
    return jax.tree.structure(settings)


def stack_settings(settings: Sequence[Settings]) -> Settings:
    """Settings of one program as one, each leaf ``[R]``.

    Raises:
        ValueError: none, or some that need another program than the first.
    """
    if not settings:
        raise ValueError("no settings to stack")
    for other in settings[1:]:
        if program(other) != program(settings[0]):
            raise ValueError(f"{other} and {settings[0]} differ in more than numbers")
    return jax.tree.map(lambda *leaves: jnp.asarray(leaves, jnp.float32), *settings)
