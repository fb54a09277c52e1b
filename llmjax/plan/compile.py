"""Compiles the train step of a run without running it: for the devices of this machine, or for a TPU that is not
there.

The TPU compiler comes with the `tpu` extra and needs no TPU. Its statement about memory is authoritative: a program
that does not fit fails to compile. In that case, the largest micro-batch that does fit is searched for.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence

import jax

from llmjax.build.compiled_programs import without_cache
from llmjax.build.program import Program
from llmjax.errors import UserError
from llmjax.plan.communication import describe_communication
from llmjax.plan.summary import tree_bytes_per_device
from llmjax.quantities import format_bytes, format_duration

# The most further micro-batches to compile. A choice: each takes as long as the first.
ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Need:
    """The memory that a compiled step needs on each device, in bytes.

    arguments    the state and the batch
    temporaries  everything else
    available    the memory of the device; 0 if unknown
    text         the compiled program; empty for a single device, and if the program does not fit
    """

    arguments: int
    temporaries: int
    available: int
    text: str = dataclasses.field(default="", repr=False)

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return not self.available or self.total <= self.available


def compile_step(program: Program, progress: Callable[[str], None] = lambda line: None) -> dict[str, str]:
    """Compiles the train step from shapes alone and returns what the compiler reports, as label -> text.

    Raises UserError if the step needs more memory than the devices have. The error names the largest micro-batch of
    the same update that fits, which takes a few more compilations; `progress` is called with a line for each.
    """
    started = time.perf_counter()
    need = measure(program)
    rows = {
        "compiled": f"in {format_duration(time.perf_counter() - started)}",
        "needs": f"{format_bytes(need.total)} per device: arguments {format_bytes(need.arguments)}, "
        f"temporaries {format_bytes(need.temporaries)}",
    }
    if need.text:
        rows["communication"] = describe_communication(need.text)
    if need.fits:
        return rows
    batch = program.batch
    text = f"{format_bytes(need.total)} of {format_bytes(need.available)} per device"
    progress(
        f"compute.micro_batch_size={batch.micro_batch_size} needs {text}; looking for the largest that fits"
    )

    def need_of(size: int) -> Need:
        need = measure(with_micro_batch(program, size))
        verdict = "fits" if need.fits else "does not fit"
        progress(f"compute.micro_batch_size={size} {verdict}: {format_bytes(need.total)}")
        return need

    sizes = smaller_micro_batches(program) if need.arguments <= need.available else []
    size, is_largest = largest_that_fits(sizes, need_of, batch.micro_batch_size, need)
    # The remedy names what helps: a smaller micro-batch, or if the state alone is too large, more devices.
    remedy = "use more devices or a larger mesh.fsdp"
    if program.config.compute.remat != "full":
        remedy = "use more devices, a larger mesh.fsdp or compute.remat='full'"
    if size:
        which = "the largest that fits is" if is_largest else "one that fits is"
        steps = batch.sequences_per_update // size
        remedy = f"{which} compute.micro_batch_size={size} (compute.accumulation_steps={steps}), or {remedy}"
    elif sizes and is_largest:
        remedy = f"nor does compute.micro_batch_size={sizes[0]}; {remedy}"
    elif not sizes and need.arguments > need.available:
        remedy = f"its state and batch alone need {format_bytes(need.arguments)}; {remedy}"
    raise UserError(
        f"compute.micro_batch_size={batch.micro_batch_size} does not fit the devices' memory ({text}); {remedy}"
    )


def measure(program: Program) -> Need:
    """The memory that the compiled train step needs. Compiling may take minutes."""
    lowered = program.lower()
    device = program.mesh.devices.flat[0]
    try:
        with without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = _sizes(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        # The message gives the memory of the whole program, or only of its temporaries, and then the available
        # memory.
        arguments = tree_bytes_per_device((program.abstract_state(), program.placement.abstract_batch()))
        temporaries = sizes[0] if "temporaries" in str(error) else max(sizes[0] - arguments, 0)
        return Need(arguments, temporaries, sizes[1])
    memory = compiled.memory_analysis()
    text = (compiled.as_text() or "") if program.mesh.size > 1 else ""
    if memory is None:
        return Need(0, 0, 0, text)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # Outputs that reuse the memory of arguments (aliases) need no memory of their own.
    temporaries += memory.output_size_in_bytes - memory.alias_size_in_bytes
    # On a TPU, temporaries share memory in ways that only the peak shows.
    if device.platform == "tpu":
        temporaries = min(temporaries, max(memory.peak_memory_in_bytes - arguments, 0))
    return Need(arguments, temporaries, available_memory(device), text)


def available_memory(device: jax.Device) -> int:
    """The bytes that programs may use on a device; 0 if the device does not say so or is not there."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit", 0)
    except jax.errors.JaxRuntimeError:
        return 0


def _sizes(text: str) -> list[int]:
    """The sizes in a compiler message, such as 15.75G, in bytes."""
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    return [int(float(n) * 1024 ** powers[unit]) for n, unit in re.findall(r"\b(\d+\.\d+)([KMGT])\b", text)]


def smaller_micro_batches(program: Program) -> list[int]:
    """The smaller micro-batch sizes, ascending, that divide every update of the run."""
    batch, mesh = program.batch, program.mesh.shape
    shards = mesh["data"] * mesh["fsdp"]
    # Updates may grow during the run (batch schedule); the micro-batch must divide all of their sizes.
    sequences = math.gcd(*(tokens // batch.seq_len for _, tokens in program.steering.schedule.points))
    return [size for size in range(shards, batch.micro_batch_size, shards) if sequences % size == 0]


def with_micro_batch(program: Program, size: int) -> Program:
    """`program` with the same updates, in micro-batches of `size` sequences."""
    batch = program.batch
    cut = dataclasses.replace(
        batch, micro_batch_size=size, accumulation_steps=batch.sequences_per_update // size
    )
    return program.changed(program.config, program.derived.with_batch(program.config, cut))


def largest_that_fits(
    sizes: Sequence[int], need_of: Callable[[int], Need], too_large: int, need: Need
) -> tuple[int, bool]:
    """The largest of the ascending `sizes` that fits (0 if none), and whether all larger ones are known not to fit.

    need_of    measures a size
    too_large  a size that does not fit, whose measurement is `need`
    """
    # `low` is the largest index known to fit, `high` the smallest known not to.
    low, high = -1, len(sizes)
    # Memory is modelled as a constant part plus a part proportional to the size. The line through the last two
    # measurements says which size to try next; bisection bounds keep the guess in the unknown range.
    points = [(0, need.arguments), (too_large, need.total)]
    for _ in range(ATTEMPTS):
        if high - low == 1:
            break
        (x0, y0), (x1, y1) = points[-2:]
        slope = (y1 - y0) / (x1 - x0)
        expected = [i for i, size in enumerate(sizes) if y1 + slope * (size - x1) <= need.available]
        guess = min(max(max(expected, default=0), low + 1), high - 1)
        found = need_of(sizes[guess])
        points.append((sizes[guess], found.total))
        low, high = (guess, high) if found.fits else (low, guess)
    return (sizes[low] if low >= 0 else 0), high - low == 1
