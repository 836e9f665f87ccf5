"""What the settings check about themselves."""

from typing import Any


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} must be at least 1, got {value}")
