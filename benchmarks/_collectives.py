"""Reads from the text of a compiled program what it sends between devices."""

import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that a collective leaves on every participating device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.sub(r"\D", "", self.dtype))
        return math.prod(self.shape) * bits // 8


def collectives(program: str) -> list[Collective]:
    """Returns every collective of an optimized program, `compiled.as_text()`.

    One in the body of a loop counts once.
    """
    found = []
    for line in program.splitlines():
        if match := _LINE.search(line):
            for dtype, sizes in _ARRAY.findall(match["result"]):
                shape = tuple(map(int, filter(None, sizes.split(","))))
                found.append(Collective(match["kind"], dtype, shape))
    return found
