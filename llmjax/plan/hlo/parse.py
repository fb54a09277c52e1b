"""Parses compiled programs: every instruction that runs, and how many times.

The compiler's own `cost_analysis()` counts the body of a loop once and ignores collectives, but the text of the
program, `compiled.as_text()`, has both. `parse` reads the text of a TPU, GPU or CPU program, and `walk` lists its
instructions with the trip counts of the loops around them. If a trip count, or the branch of a conditional, depends
on the data, the caller provides how many times it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

# A loop that runs longer than this counts as data-dependent; the search for its end must stop somewhere.
TRIPS_AT_MOST = 2**40

# How many times data-dependent loops and branches run: by name, or one number for all.
Trips = Mapping[str, float] | float
NO_TRIPS: Trips = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape. `space` 0 is the main memory of the device; on a TPU 1 is VMEM and 5 is host memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """The size in bytes, without padding."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = int(bits[1]) if bits else 8 * (self.dtype == "pred")
        return math.ceil(math.prod(self.dims) * width / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line `name = shape opcode(arguments), attributes`. The argument of a constant is its value, and the
    argument of a parameter is its number."""

    name: str
    shape: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result; nested tuples are flattened."""
        found = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", self.shape)
        return [
            Array(
                dtype,
                tuple(int(n.lstrip("<=")) for n in dims.split(",") if n),
                int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
            )
            for dtype, dims, layout in found
        ]

    @property
    def op_name(self) -> str:
        """The place in the traced program that the instruction comes from, such as `jit(f)/while/body/psum`; "" if
        not given."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *roles: str) -> list[str]:
        """The names of the computations that the instruction calls in these roles: `calls`, `body`,
        `branch_computations` and so on."""
        found = re.findall(rf"\b(?:{'|'.join(roles)})=\{{?((?:%[\w.\-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


@dataclasses.dataclass(frozen=True)
class Computation:
    """The instructions by name, in the order of the text, which is the schedule."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program. `main_spaces` are the memory spaces in the main memory of the device."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int
    main_spaces: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction and how many times it runs.

    runs    how many times, if each entry of `within` ran once
    within  the data-dependent loops and branches around the instruction: a loop by the name of its instruction
            (`while.5`), a branch by the conditional and its number (`conditional.2[0]`)
    """

    instruction: Instruction
    computation: Computation
    runs: int
    within: tuple[str, ...]

    def times(self, trips: Trips = NO_TRIPS) -> float:
        """How many times the instruction runs. Raises KeyError for a loop or branch that `trips` lacks."""
        each = (trips if isinstance(trips, int | float) else trips[name] for name in self.within)
        return self.runs * math.prod(each)


@dataclasses.dataclass(frozen=True)
class Loop(Site):
    """A while loop. `trips` is None if the number of iterations depends on the data."""

    trips: int | None


def parse(text: str) -> Module:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry = ""
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}" and lines:
            instructions = {ins.name: ins for ins in map(_instruction, lines)}
            root = next((ln for ln in lines if ln.lstrip().startswith("ROOT ")), lines[-1])
            computations[name] = Computation(name, instructions, _instruction(root).name)
            lines = []
        elif re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
            lines.append(line)
        # Mosaic kernels have line breaks in their attributes.
        elif lines:
            lines[-1] += line
    head = text.split("\n", 1)[0]
    sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
    # Tiled layouts, written T(...), occur in TPU programs only; there, space 1 is not main memory.
    main_spaces = (0,) if ":T(" in head else (0, 1)
    return Module(computations, entry, math.prod(map(int, sizes)), main_spaces)


def _instruction(line: str) -> Instruction:
    """Parses one line."""
    name, rest = find(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)", line).groups()
    size = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:size], rest[size:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    arguments = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, shape, rest[:start], arguments, operands, rest[end + 1 :])


def find(pattern: str, text: str) -> re.Match[str]:
    """The first match of `pattern`. Raises ValueError if there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return found


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def walk(module: Module) -> Iterator[Site]:
    """Every scheduled instruction: in the entry computation, and in the loops, branches and calls that it leads
    to.

    A fusion or an asynchronous wrapper is one instruction; its inner instructions are not listed.
    """

    def visit(
        computation: Computation, known: list[Any], runs: int, within: tuple[str, ...]
    ) -> Iterator[Site]:
        values = _Values(module, computation, known)
        for ins in computation.instructions.values():
            # The condition runs once more than the body, which is neglected.
            if ins.opcode == "while":
                trips, kept = _trips(module, ins, values[ins.operands[0]])
                yield Loop(ins, computation, runs, within, trips)
                place = (runs * trips, within) if trips is not None else (runs, (*within, ins.name))
                for name in ins.called("condition", "body"):
                    yield from visit(module.computations[name], [kept], *place)
                continue
            yield Site(ins, computation, runs, within)
            # The first operand selects the branch; the others are the arguments of the branches.
            if ins.opcode == "conditional":
                branches = ins.called("branch_computations", "true_computation", "false_computation")
                for i, (name, operand) in enumerate(zip(branches, ins.operands[1:], strict=True)):
                    place = (runs, (*within, f"{ins.name}[{i}]"))
                    yield from visit(module.computations[name], [values[operand]], *place)
            elif ins.opcode == "call":
                arguments = [values[operand] for operand in ins.operands]
                yield from visit(module.computations[ins.called("to_apply")[0]], arguments, runs, within)

    yield from visit(module.computations[module.entry], [], 1, ())


def loops(module: Module) -> list[Loop]:
    """Every while loop; outer loops come first."""
    return [site for site in walk(module) if isinstance(site, Loop)]


class _Values:
    """The integers of a computation that follow from constants and from the `known` values of its parameters.

    The value of a tuple is a list. Arrays and unknown values are None.
    """

    ARITHMETIC: ClassVar[dict[str, Callable[..., Any]]] = {
        "add": lambda a, b: a + b,
        "subtract": lambda a, b: a - b,
        "multiply": lambda a, b: a * b,
        "maximum": max,
        "minimum": min,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "select": lambda p, a, b: a if p else b,
    }
    COMPARE: ClassVar[dict[str, Callable[..., Any]]] = {
        "LT": lambda a, b: a < b,
        "LE": lambda a, b: a <= b,
        "GT": lambda a, b: a > b,
        "GE": lambda a, b: a >= b,
        "EQ": lambda a, b: a == b,
        "NE": lambda a, b: a != b,
    }

    def __init__(self, module: Module, computation: Computation, known: list[Any]) -> None:
        self.module, self.computation, self.known = module, computation, known
        self.cache: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.cache:
            self.cache[name] = self._value(self.computation.instructions[name])
        return self.cache[name]

    def _value(self, ins: Instruction) -> Any:
        if not re.match(r"\(|[su]\d+\[\]|pred\[\]", ins.shape):
            return None
        opcode, operands = ins.opcode, ins.operands
        if opcode == "constant":
            text = {"true": "1", "false": "0"}.get(ins.arguments, ins.arguments)
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        if opcode == "parameter":
            number = int(ins.arguments)
            return self.known[number] if number < len(self.known) else None
        # Loops carry their whole state as one tuple, so counters are looked up through it.
        if opcode == "tuple":
            return [self[operand] for operand in operands]
        if opcode == "get-tuple-element":
            whole = self[operands[0]]
            return whole[int(find(r"index=(\d+)", ins.attributes)[1])] if whole else None
        # These change how a value is stored, not the value.
        if opcode in ("copy", "bitcast", "convert", "reshape", "opt-barrier"):
            return self[operands[0]]
        if opcode in ("fusion", "call"):
            computation = self.module.computations[ins.called("calls", "to_apply")[0]]
            return _Values(self.module, computation, [self[operand] for operand in operands])[
                computation.root
            ]
        function = self.ARITHMETIC.get(opcode)
        if opcode == "compare":
            function = self.COMPARE[find(r"direction=(\w+)", ins.attributes)[1]]
        if function is None:
            return None
        values = [self[operand] for operand in operands]
        return None if None in values else function(*values)


def _trips(module: Module, loop: Instruction, start: Any) -> tuple[int | None, Any]:
    """The number of iterations of a while loop (None if it depends on the data), and the known part of its state that
    never changes.

    `start` is the known part of its initial state.
    """
    condition, body = (module.computations[loop.called(role)[0]] for role in ("condition", "body"))

    def iterate(state: Any) -> Any:
        return _Values(module, body, [state])[body.root]

    # CPU and GPU programs state the number; in TPU programs it has to be found from the condition.
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    first = iterate(start) if start else None
    second = iterate(first) if first else None
    if not (first and second):
        return (int(known[1]) if known else None), None
    # A counter is a state that changes by the same amount in the first two iterations. It is assumed to do so in all
    # of them.
    steps = [
        b - a if isinstance(a, int) and isinstance(b, int) and isinstance(c, int) and c - b == b - a else None
        for a, b, c in zip(start, first, second, strict=True)
    ]
    kept = [a if step == 0 else None for a, step in zip(start, steps, strict=True)]
    if known:
        return int(known[1]), kept

    def goes_on(i: int) -> int | None:
        state = [None if step is None else a + i * step for a, step in zip(start, steps, strict=True)]
        return _Values(module, condition, [state])[condition.root]

    # The loop continues at all iterations before `low`, and not at `high`: doubling, then bisection. The condition is
    # assumed to hold until it first fails.
    low, high = 0, 1
    while (on := goes_on(high - 1)) and high < TRIPS_AT_MOST:
        low, high = high, 2 * high
    if on is None or on:
        return None, kept
    low, high = low, high - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if goes_on(middle) else (low, middle)
    return low, kept
