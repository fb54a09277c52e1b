"""Counts the floating point operations of matrix products in a compiled program, from its text.

The compiler's own `cost_analysis()` counts the body of a loop once. Here every product counts as many times as it
runs, also inside of fusions, where TPU programs have nearly all of them, as convolutions. Products inside of kernels
and libraries are not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from llmjax.plan.hlo.parse import NO_TRIPS, Computation, Instruction, Module, Trips, find, walk


def product_flops(module: Module, trips: Trips = NO_TRIPS) -> float:
    """Two operations for each multiplication in the dots and convolutions of one run. For `trips` see `Site.times`."""
    total = 0.0
    for site in walk(module):
        # A fusion runs all of its products each time it runs.
        inside = sum(_flops(*found) for found in _products(module, site.instruction, site.computation))
        if inside:
            total += inside * site.times(trips)
    return total


def _products(
    module: Module, ins: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """The dots and convolutions that this instruction is, or contains as a fusion or an asynchronous wrapper."""
    if ins.opcode in ("dot", "convolution"):
        yield ins, computation
    elif ins.opcode in ("fusion", "async-start"):
        for name in ins.called("calls"):
            for inner in module.computations[name].instructions.values():
                yield from _products(module, inner, module.computations[name])


def _flops(ins: Instruction, computation: Computation) -> int:
    """The operations of one dot or convolution."""
    left, right = (computation.instructions[name].arrays[0].dims for name in ins.operands[:2])
    (result,) = ins.arrays
    if ins.opcode == "dot":
        # Each element of the result is a sum over the contracted dimensions of the left operand.
        contracted = find(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes)[1]
        return 2 * math.prod(result.dims) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    # Labels such as bf_io->bf: b batch, f features, i and o the kernel's input and output features, digits spatial.
    labels = find(r"dim_labels=(\w+)_(\w+)->(\w+)", ins.attributes).groups()
    sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels, (left, right, result.dims), strict=True)]
    image, kernel, out = sizes
    window = find(r"window=\{([^}]*)\}|$", ins.attributes)[1] or ""
    taps = math.prod(
        _taps(image[str(i)], kernel[str(i)], out[str(i)], {key: value.split("x")[i] for key, value in parts})
        for parts in [re.findall(r"(\w+)=(\S+)", window)]
        for i in range(len(labels[0]) - 2)
    )
    return 2 * out["b"] * out["f"] * kernel["i"] * taps


def _taps(image: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """The pairs of an output position and a kernel position, along one spatial dimension, that read an element of the
    input.

    On a TPU, the batch dimension of a product becomes a spatial dimension, in which only one pair per output is
    valid; so padding must not be counted.
    """
    stride, spread, dilate = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * dilate - before for o in range(out) for k in range(kernel))
    return sum(place % spread == 0 and 0 <= place // spread < image for place in places)
