"""Which method keeps a moment of which leaf: what `first_moment=` and so on say."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorapre_jax._trees.paths import compiled


class Choice(NamedTuple):
    """Which method keeps one moment.

    Attributes:
      argument: Name of the argument, for errors.
      rules: Patterns on leaf paths, compiled once, and their methods.
      block: The method of all leaves that no pattern matches, except embeddings and
        heads.
      end: The method of embeddings and heads that no pattern matches.
    """

    argument: str
    rules: tuple[tuple[re.Pattern[str], Any], ...]
    block: Any
    end: Any

    def of(self, path: str, is_end: bool) -> Any:
        found = {method for pattern, method in self.rules if pattern.search(path)}
        if len(found) > 1:
            raise ValueError(
                f"`{self.argument}`: two patterns give leaf '{path}' different "
                f"methods, {' and '.join(sorted(map(repr, found)))}. Make them "
                "exclude one another."
            )
        return found.pop() if found else self.end if is_end else self.block

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Raises an error if a pattern matches no leaf; masked leaves count."""
        paths = list(paths)
        for pattern, _ in self.rules:
            if not any(map(pattern.search, paths)):
                raise ValueError(
                    f"`{self.argument}`: pattern {pattern.pattern!r} matches no leaf. "
                    f"The leaves are {', '.join(map(repr, paths[:8]))}"
                    f"{' ...' if len(paths) > 8 else ''}."
                )


def choice(argument: str, given: Any, block: Any, end: Any = None) -> Choice:
    """Returns the choice given by one method, a mapping from patterns, or None."""
    end = block if end is None else end
    if given is None:
        return Choice(argument, (), block, end)
    if not isinstance(given, Mapping):
        return Choice(argument, (), given, given)
    rules = []
    for pattern, method in given.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{argument}` takes regular expressions as keys, got {pattern!r}."
            )
        try:
            rules.append((compiled(pattern), method))
        except re.error as error:
            raise ValueError(
                f"`{argument}`: {pattern!r} is not a regular expression: {error}."
            ) from error
    return Choice(argument, tuple(rules), block, end)
