"""Reading compiled programs: every instruction that runs, and how often it does.

The compiler's own `cost_analysis()` counts the body of a loop once and knows no collectives; the program's text,
`compiled.as_text()`, has it all. `parse` reads that of a TPU, GPU or CPU, and `walk` goes through it with the trip
counts of the enclosing loops. Where a loop's bound, or the branch of a conditional, is known only when the program
runs, the caller says how often it does. `traffic` adds up what is found here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

TRIPS_AT_MOST = 2**40

Trips = Mapping[str, float] | float  # of data-dependent loops and branches: by name, or one number for all
NO_TRIPS: Trips = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape. `space`: 0 is the device's main memory; on a TPU 1 is VMEM, 5 the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = int(bits[1]) if bits else 8 * (self.dtype == "pred")
        return math.ceil(math.prod(self.dims) * width / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(arguments), attributes`; a constant's argument is its value, a parameter's its number."""

    name: str
    shape: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result, nested tuples flattened."""
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
        """Where it comes from in the traced program, for example `jit(f)/while/body/psum`; "" where not said."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it calls as `calls`, `body`, `branch_computations` and so on."""
        found = re.findall(rf"\b(?:{'|'.join(roles)})=\{{?((?:%[\w.\-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Its instructions by name, in the order of the text, which is the schedule."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program. `main_spaces`: the memory spaces that lie in the device's main memory."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int
    main_spaces: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction and how often it runs.

    runs    how many times, where nothing in `within` is taken more than once
    within  what encloses the instruction and runs as often as the data says: loops by the name of their instruction
            (`while.5`), branches by the name of the conditional and their number (`conditional.2[0]`). The instruction
            runs `runs` times for each turn of all of these
    """

    instruction: Instruction
    computation: Computation
    runs: int
    within: tuple[str, ...]

    def times(self, trips: Trips = NO_TRIPS) -> float:
        """How often it runs; KeyError for a loop or branch that `trips` does not name."""
        each = (trips if isinstance(trips, int | float) else trips[name] for name in self.within)
        return self.runs * math.prod(each)


@dataclasses.dataclass(frozen=True)
class Loop(Site):
    """A while loop; `trips` is None where its bound is known only when it runs."""

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
        elif lines:  # Mosaic kernels carry line breaks in their attributes
            lines[-1] += line
    head = text.split("\n", 1)[0]
    sizes = re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
    main_spaces = (0,) if ":T(" in head else (0, 1)
    return Module(computations, entry, math.prod(map(int, sizes)), main_spaces)


def _instruction(line: str) -> Instruction:
    name, rest = find(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)", line).groups()
    size = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:size], rest[size:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    arguments = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, shape, rest[:start], arguments, operands, rest[end + 1 :])


def find(pattern: str, text: str) -> re.Match[str]:
    """What fits `pattern` first; ValueError where nothing does."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return found


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def walk(module: Module) -> Iterator[Site]:
    """Every instruction that is scheduled: in the entry, and in the loops, branches and calls that it leads to.

    What is inside a fusion or an asynchronous wrapper is one piece of work and does not come apart.
    """

    def visit(
        computation: Computation, known: list[Any], runs: int, within: tuple[str, ...]
    ) -> Iterator[Site]:
        values = _Values(module, computation, known)
        for ins in computation.instructions.values():
            if ins.opcode == "while":
                trips, kept = _trips(module, ins, values[ins.operands[0]])
                yield Loop(ins, computation, runs, within, trips)
                place = (runs * trips, within) if trips is not None else (runs, (*within, ins.name))
                for name in ins.called("condition", "body"):
                    yield from visit(module.computations[name], [kept], *place)
                continue
            yield Site(ins, computation, runs, within)
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
    """Every while loop, outer ones first."""
    return [site for site in walk(module) if isinstance(site, Loop)]


class _Values:
    """Integers of a computation that follow from constants and from what is `known` of its parameters.

    An array, or what is not known, is None; a tuple is a list.
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
        if opcode == "tuple":
            return [self[operand] for operand in operands]
        if opcode == "get-tuple-element":
            whole = self[operands[0]]
            return whole[int(find(r"index=(\d+)", ins.attributes)[1])] if whole else None
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
    """How often a while loop runs (None: depends on data), and what of its state is known and stays the same.

    `start` is what is known of the state at first. A counter is what grows by the same amount in two turns; the loop
    ends at the first turn at which its condition does not hold, and is taken to hold at all turns before that.
    """
    condition, body = (module.computations[loop.called(role)[0]] for role in ("condition", "body"))

    def iterate(state: Any) -> Any:
        return _Values(module, body, [state])[body.root]

    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    first = iterate(start) if start else None
    second = iterate(first) if first else None
    if not (first and second):
        return (int(known[1]) if known else None), None
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

    low, high = 0, 1  # it goes on at all turns before `low`; not at `high`
    while (on := goes_on(high - 1)) and high < TRIPS_AT_MOST:
        low, high = high, 2 * high
    if on is None or on:
        return None, kept
    low, high = low, high - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if goes_on(middle) else (low, middle)
    return low, kept
