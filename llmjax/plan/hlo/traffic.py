"""What a compiled program communicates, and how much memory it reads and writes, from its text.

`collectives` lists the communication and `bytes_touched` adds up the traffic of the main memory. Both know how many
times loops run, which the compiler's own `cost_analysis()` does not.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

from llmjax.plan.hlo.parse import NO_TRIPS, Computation, Instruction, Module, Site, Trips, find, walk


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of collective in a group of n devices.

    grows  function of n to (bytes that a device receives as the result) / (bytes that it puts in)
    sends  function of n to (bytes that a device sends) / (bytes that it puts in)
    """

    grows: Callable[[int], float]
    sends: Callable[[int], float]


KINDS = {
    "all-reduce": Kind(lambda n: 1, lambda n: 2 * (n - 1) / n),
    "all-gather": Kind(lambda n: n, lambda n: n - 1),
    "reduce-scatter": Kind(lambda n: 1 / n, lambda n: (n - 1) / n),
    "collective-permute": Kind(lambda n: 1, lambda n: min(n, 1)),
    "all-to-all": Kind(lambda n: 1, lambda n: (n - 1) / n),
}
# Instructions that only name or regroup values.
NAMES = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "opt-barrier",
}  # of values; no work
# Control flow, whose work is in the computations it calls, and instructions without data.
CONTROL = {"while", "conditional", "call", "after-all", "add-dependency", "partition-id", "replica-id"}
# Targets of custom calls that do nothing at run time.
NO_WORK = ('"AllocateBuffer"', '"ConcatBitcast"', '"AssumeGatherIndicesInBound"')
# Instructions that read a part of their first operand.
SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective(Site):
    """One collective operation. Bytes are per device and run.

    kind           a key of KINDS
    dtype          the dtype of its largest operand, as XLA writes it
    operand_bytes  the bytes that each device puts in, over all operands
    group_size     the number of devices that take part together
    asynchronous   whether other work may run between its start and its end
    between        the work scheduled there: fusions, matrix products, kernels, loops. If the end is in another
                   computation, all that follows the start
    """

    kind: str
    dtype: str
    operand_bytes: int
    group_size: int
    asynchronous: bool
    between: tuple[Instruction, ...]

    @property
    def result_bytes(self) -> int:
        """The bytes of the result on each device, in the dtype of the operands."""
        return round(self.operand_bytes * KINDS[self.kind].grows(self.group_size))

    @property
    def sent_bytes(self) -> int:
        """The bytes that each device sends by the usual algorithms, for b operand bytes and groups of n devices.

        All-gather around a ring: (n - 1) b. Reduce-scatter around a ring: (n - 1) / n b. All-reduce, as both in
        sequence (Patarasuk and Yuan 2009): 2 (n - 1) / n b. All-to-all: (n - 1) / n b. Permutation: b.
        """
        return round(self.operand_bytes * KINDS[self.kind].sends(self.group_size))


def collectives(module: Module) -> list[Collective]:
    """Every collective that the program runs, in the order of its text."""
    found = []
    for site in walk(module):
        ins, home = site.instruction, site.computation
        inner, kind = ins, ins.opcode.removesuffix("-start")
        if ins.opcode in ("fusion", "async-start"):
            home = module.computations[ins.called("calls")[0]]
            wrapped = _collective(home)
            if wrapped is None or _stage(home) in ("step", "done"):
                continue
            inner = wrapped
            # On a TPU, a reduce-scatter is an all-reduce fused with the slice that each device keeps.
            scatter = inner.opcode == "all-reduce" and home.name.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scatter else inner.opcode
        if kind not in KINDS:
            continue
        starts = ins.opcode.endswith("-start") or _stage(home) == "start"
        asynchronous = starts and '"is_sync":true' not in ins.attributes
        operands = [a for name in inner.operands for a in home.instructions[name].arrays]
        found.append(
            Collective(
                **vars(site),
                kind=kind,
                dtype=max(operands, key=lambda a: a.bytes).dtype,
                operand_bytes=sum(a.bytes for a in operands),
                group_size=_group_size(inner, module.num_devices),
                asynchronous=asynchronous,
                between=_between(module, site) if asynchronous else (),
            )
        )
    return found


def _collective(computation: Computation) -> Instruction | None:
    """The collective inside of a fusion or an asynchronous wrapper."""
    return next((ins for ins in computation.instructions.values() if ins.opcode in KINDS), None)


def _stage(computation: Computation) -> str:
    """Which part of an asynchronous collective of a TPU this fused computation is: start, step or done; "" if none.

    One collective is spread over a chain of fusions. All of them contain it, and steps are fused with other work.
    """
    calls = [ins.attributes for ins in computation.instructions.values() if ins.opcode == "custom-call"]
    for stage in ("Start", "Done"):
        if any(f'"AsyncCollective{stage}"' in attributes for attributes in calls):
            return stage.lower()
    return "step" if computation.name.startswith("async_collective_fusion") else ""


def _between(module: Module, start: Site) -> tuple[Instruction, ...]:
    """The work between the start of an asynchronous collective and its end."""

    def stage_and_channel(ins: Instruction) -> tuple[str, str]:
        if ins.opcode != "fusion":
            return "", ""
        computation = module.computations[ins.called("calls")[0]]
        inner = _collective(computation)
        return (_stage(computation), _channel(inner)) if inner else ("", "")

    work, names = [], {start.instruction.name}
    channel = stage_and_channel(start.instruction)[1]
    instructions = list(start.computation.instructions.values())
    for ins in instructions[instructions.index(start.instruction) + 1 :]:
        # `names` collects all values that stand for the collective under way, through tuples and updates.
        follows = not names.isdisjoint(ins.operands)
        stage, other = stage_and_channel(ins)
        if (follows and ins.opcode.endswith("-done")) or (stage == "done" and other == channel):
            break
        if follows and (ins.opcode in NAMES or ins.opcode.endswith("-update")):
            names.add(ins.name)
        moves = ins.opcode in ("copy", *KINDS) or re.search(r"-(start|update|done)$", ins.opcode)
        if not moves and stage not in ("start", "done") and not _is_free(ins):
            work.append(ins)
    return tuple(work)


def _channel(ins: Instruction) -> str:
    return find(r"channel_id=\d+|$", ins.attributes)[0]


def _group_size(ins: Instruction, num_devices: int) -> int:
    """The number of devices in each group, for which there are four notations; for a permutation, the devices that
    send to another."""
    text = ins.attributes
    # Notations: pairs of a permutation; lists of devices; [groups, devices per group]; axes of a named mesh.
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return sum(source != target for source, target in re.findall(r"(\d+),(\d+)", pairs[1]))
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return groups[1].count(",") + 1
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(groups[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return num_devices


def _is_free(ins: Instruction) -> bool:
    """Whether the instruction does no work at run time."""
    if ins.opcode == "custom-call":
        return any(target in ins.attributes for target in NO_WORK)
    return ins.opcode in NAMES or ins.opcode in CONTROL - {"while", "conditional", "call"}


def bytes_touched(module: Module, trips: Trips = NO_TRIPS) -> float:
    """The bytes that one run of the program reads from and writes to the main memory of the device.

    Every scheduled instruction reads its operands and writes its results; inside of a fusion nothing else counts. A
    slice, a gather or an update in place counts only the part that it reads or changes. Not counted: what the
    compiler keeps in a TPU's VMEM, the padding of layouts, and repeated reads by a kernel. For `trips` see
    `Site.times`.
    """
    total = 0.0
    for site in walk(module):
        ins = site.instruction
        if ins.opcode in CONTROL or _is_free(ins) or re.search(r"-(done|update)$", ins.opcode):
            continue
        if touched := _touched(_Traffic(module, site.computation), ins):
            total += touched * site.times(trips)
    return total


def _touched(traffic: _Traffic, ins: Instruction) -> int:
    # The result of an asynchronous slice comes second in its shape, after the operand.
    if ins.opcode.removesuffix("-start") in SLICES and ins.opcode.endswith("-start"):
        part = ins.arrays[1]
        return part.bytes + (part.bytes if part.space in traffic.module.main_spaces else 0)
    if ins.opcode.endswith("-start") and ins.opcode != "all-reduce-start":
        # The shape of a start contains its operands and its results.
        return traffic.size(ins)
    return sum(traffic.read(ins, i) for i in range(len(ins.operands))) + traffic.written(ins)


@dataclasses.dataclass(frozen=True)
class _Traffic:
    """The bytes in main memory that the instructions of one computation read and write. `fused`: the computation is
    inside of a fusion."""

    module: Module
    computation: Computation
    fused: bool = False

    def size(self, ins: Instruction) -> int:
        """The bytes of the result that lie in main memory."""
        return sum(a.bytes for a in ins.arrays if a.space in self.module.main_spaces)

    def read(self, ins: Instruction, index: int) -> int:
        """The bytes that an instruction reads of operand number `index`."""
        whole = self.size(self.computation.instructions[ins.operands[index]])
        if index == 0 and ins.opcode in SLICES:
            return min(whole, sum(a.bytes for a in ins.arrays))
        # An update in place does not read the old contents.
        if index == 0 and ins.opcode == "dynamic-update-slice":
            return 0
        if index == 0 and ins.opcode == "scatter":
            return min(whole, self._changed(ins))
        if ins.opcode == "fusion" and whole:
            inside = self._inside(ins)
            value = inside._parameter(index)
            # An inner fusion that only returns a view of its operand does not read it: whoever reads the result reads
            # all of it.
            is_view = self.fused and inside._is_view(inside.computation.root, value)
            return whole if is_view else min(whole, inside._read_of(value))
        return whole

    def written(self, ins: Instruction) -> int:
        """The bytes that an instruction writes."""
        whole = self.size(ins)
        operands = [self.computation.instructions[name] for name in ins.operands]
        if ins.opcode == "fusion" and whole:
            inside = self._inside(ins)
            return min(whole, inside.written(inside.computation.instructions[inside.computation.root]))
        if ins.opcode in ("dynamic-update-slice", "scatter") and self._is_in_place(operands[0]):
            return min(whole, self._changed(ins))
        if not self.fused:
            return whole
        if ins.opcode == "tuple":
            return sum(self.written(operand) for operand in operands)
        if ins.opcode == "bitcast":
            return min(whole, self.written(operands[0]))
        # Its arrays are the operand, then the result.
        if '"AsyncCollectiveStart"' in ins.attributes:
            return sum(a.bytes for a in ins.arrays[1:] if a.space in self.module.main_spaces)
        return 0 if ins.opcode == "parameter" or self._is_later_stage(ins) else whole

    def _read_of(self, value: Instruction) -> int:
        """The bytes that a fused computation reads of a parameter, or of a view of it, in all of its uses."""
        total = 0
        for ins in self.computation.instructions.values():
            if value.name not in ins.operands or ins.opcode == "tuple" or self._is_later_stage(ins):
                continue
            if ins.opcode == "bitcast":
                total += self._read_of(ins)
            else:
                total += sum(self.read(ins, i) for i, name in enumerate(ins.operands) if name == value.name)
        return total

    def _is_view(self, name: str, value: Instruction) -> bool:
        """Whether the instruction `name` is `value` or a view of it."""
        while name != value.name and self.computation.instructions[name].opcode == "bitcast":
            name = self.computation.instructions[name].operands[0]
        return name == value.name

    def _is_in_place(self, operand: Instruction) -> bool:
        """Whether an update of `operand` happens in its own buffer: outside of a fusion, or on a parameter of the
        fusion."""
        while operand.opcode == "bitcast":
            operand = self.computation.instructions[operand.operands[0]]
        return not self.fused or operand.opcode == "parameter"

    def _changed(self, ins: Instruction) -> int:
        """The bytes that an update in place changes."""
        update = ins.operands[1 if ins.opcode == "dynamic-update-slice" else -1]
        return sum(a.bytes for a in self.computation.instructions[update].arrays)

    def _is_later_stage(self, ins: Instruction) -> bool:
        """Whether this belongs to an asynchronous collective that an earlier fusion has started and accounts for."""
        belongs = ins.opcode in KINDS or '"AsyncCollectiveDone"' in ins.attributes
        return belongs and _stage(self.computation) in ("step", "done")

    def _inside(self, fusion: Instruction) -> _Traffic:
        return _Traffic(self.module, self.module.computations[fusion.called("calls")[0]], fused=True)

    def _parameter(self, number: int) -> Instruction:
        for ins in self.computation.instructions.values():
            if ins.opcode == "parameter" and ins.arguments == str(number):
                return ins
        raise ValueError(f"{self.computation.name} has no parameter {number}")
