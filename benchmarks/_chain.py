"""The longest chain of dependent instructions of a compiled program, from its text.

On an accelerator each of them is a kernel or a transfer that starts when the one before
has ended, so where arrays are small the chain is the time. An instruction counts one, a
fusion too; a loop its body times its trips; a factorisation or triangular solve of `(r,
r)` matrices counts r. What only renames or places data counts nothing.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota",
    "partition-id", "replica-id", "after-all", "opt-barrier", "copy-done",
}  # fmt: skip
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|true_computation|false_computation|"
    r"branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FACTORISATION = re.compile(r"cholesky|potrf|trsm|triangular|InvertDiag", re.I)


class Instruction(NamedTuple):
    name: str
    operation: str
    operands: list[str]
    text: str


def longest_chain(program: str) -> int:
    """Of an optimized program (`compiled.as_text()`).

    Raises:
      ValueError: A loop does not say how often it runs.
    """
    computations: dict[str, int] = {}
    limits: dict[str, int | None] = {}
    for name, is_entry, instructions in _computations(program):
        # A computation stands in the text before those that call it.
        computations[name] = _length(instructions, computations, limits)
        limits[name] = _limit(instructions)
        if is_entry:
            return computations[name]
    raise ValueError("This is no compiled program: it has no ENTRY.")


def _length(instructions: list[Instruction], computations, limits) -> int:
    ends: dict[str, int] = {}
    for each in instructions:
        begin = max((ends.get(name, 0) for name in each.operands), default=0)
        ends[each.name] = begin + _cost(each, computations, limits)
    return max(ends.values(), default=0)


def _cost(each: Instruction, computations, limits) -> int:
    if each.operation in _FREE:
        return 0
    called = {kind: _NAME.findall(names) for kind, names in _CALLED.findall(each.text)}
    if each.operation == "while":
        (body,), (condition,) = called["body"], called["condition"]
        said = _TRIPS.search(each.text)
        trips = int(said[1]) if said else limits[condition]
        if trips is None:
            raise ValueError(f"The loop {each.name} does not say how often it runs.")
        return trips * (computations[body] + computations[condition])
    if each.operation in ("call", "conditional"):
        return max(computations[name] for names in called.values() for name in names)
    if _FACTORISATION.search(each.operation + each.text.partition("metadata=")[0]):
        return max(_smaller_side(each.text), 1)
    return 1


def _limit(instructions: list[Instruction]) -> int | None:
    """Of a loop from zero, if that is what the condition is of: its only integer."""
    texts = [each.text for each in instructions if each.operation == "constant"]
    found = [
        int(m[1]) for t in texts if (m := re.match(r"s32\[\].* constant\((\d+)\)", t))
    ]
    return found[0] if len(found) == 1 else None


def _smaller_side(text: str) -> int:
    """Of the last two axes of the first result."""
    found = re.search(r"\[([\d,]*)\]", text)
    sizes = [int(n) for n in found[1].split(",") if n] if found else []
    return min(sizes[-2:], default=1)


def _computations(program: str) -> Iterator[tuple[str, bool, list[Instruction]]]:
    name, is_entry, found = "", False, []
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            name, is_entry, found = head["name"], bool(head["entry"]), []
        elif line.startswith("}"):
            yield name, is_entry, found
        elif match := _INSTRUCTION.match(line):
            found.append(_instruction(match["name"], match["rest"]))


def _instruction(name: str, rest: str) -> Instruction:
    operation, operands = _split(rest)
    return Instruction(name, operation, _NAME.findall(operands), rest)


def _split(rest: str) -> tuple[str, str]:
    """The operation and its operands of `shape operation(operands), attributes`."""
    found = re.search(r"(?:^|[\s\)\}\]])([a-z][\w\-]*)\(", rest)
    assert found is not None, rest
    depth, end = 1, found.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return found[1], rest[found.end() : end - 1]
