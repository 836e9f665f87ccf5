"""Checks of settings, and the expansion of ~ in paths."""

import dataclasses
import math
import os
from typing import Any


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{setting(config, name)} must be at least 1, got {value}")


def require_finite(config: Any) -> None:
    """Checks that all fields that are floats are finite."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{setting(config, field.name)} must be a finite number, got {value}",
        )


def setting(config: Any, name: str) -> str:
    """Returns a field's name in messages, with the group that it is in."""
    return f"`{config.GROUP}{name}`"


def expand_home(config: Any, *names: str) -> None:
    """Expands ~ at the start of paths, which a shell does not do within a word."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            expanded = type(value)(os.path.expanduser(value))
            object.__setattr__(config, name, expanded)  # It is frozen.
