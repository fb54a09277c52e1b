"""Floating point operations of a compiled program's matrix products, read from its text.

The compiler's own `cost_analysis()` counts the body of a loop once. Here every product counts as often as it runs,
also inside a fusion, where a TPU has nearly all of them, as convolutions; but not those of kernels and libraries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from llmjax.plan.hlo.parse import NO_TRIPS, Computation, Instruction, Module, Trips, find, walk


def product_flops(module: Module, trips: Trips = NO_TRIPS) -> float:
    """Two for each multiplication in the dots and convolutions of one run. `trips`: see `Site.times`."""
    total = 0.0
    for site in walk(module):
        inside = sum(_flops(*found) for found in _products(module, site.instruction, site.computation))
        if inside:
            total += inside * site.times(trips)
    return total


def _products(
    module: Module, ins: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation]]:
    """The instruction itself, or those that it fuses or wraps."""
    if ins.opcode in ("dot", "convolution"):
        yield ins, computation
    elif ins.opcode in ("fusion", "async-start"):
        for name in ins.called("calls"):
            for inner in module.computations[name].instructions.values():
                yield from _products(module, inner, module.computations[name])


def _flops(ins: Instruction, computation: Computation) -> int:
    left, right = (computation.instructions[name].arrays[0].dims for name in ins.operands[:2])
    (result,) = ins.arrays
    if ins.opcode == "dot":
        contracted = find(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes)[1]
        return 2 * math.prod(result.dims) * math.prod(left[int(i)] for i in contracted.split(",") if i)
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
    """Pairs of an output and a kernel position, along one dimension, that meet a number of the image; a TPU writes the
    batches of a product as a dimension in which only one pair of each output does."""
    stride, spread, dilate = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * dilate - before for o in range(out) for k in range(kernel))
    return sum(place % spread == 0 and 0 <= place // spread < image for place in places)
