"""Published figures of accelerators: peak dense bfloat16 FLOP/s and memory, by the device kind that jax reports.

Sources: the data sheets of the vendors (cloud.google.com/tpu/docs, nvidia.com). For an unknown device, no utilisation
is reported.
"""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device, as jax counts devices.

    peak_flops  dense bfloat16 FLOP/s
    memory      bytes
    """

    peak_flops: float
    memory: float


ACCELERATORS = {
    "TPU v4": Accelerator(275e12, 32 * 2**30),
    "TPU v5 lite": Accelerator(197e12, 16 * 2**30),
    "TPU v5": Accelerator(459e12, 95 * 2**30),
    "TPU v5p": Accelerator(459e12, 95 * 2**30),
    "TPU v6 lite": Accelerator(918e12, 32 * 2**30),
    # jax counts the two cores of a chip as two devices.
    "TPU7x": Accelerator(1153.5e12, 96 * 2**30),
    "NVIDIA A100-SXM4-40GB": Accelerator(312e12, 40e9),
    "NVIDIA A100-SXM4-80GB": Accelerator(312e12, 80e9),
    "NVIDIA H100 80GB HBM3": Accelerator(989e12, 80e9),
    "NVIDIA H200": Accelerator(989e12, 141e9),
    "NVIDIA B200": Accelerator(2250e12, 180e9),
}


def peak_flops(devices: list[jax.Device]) -> float:
    """The peak FLOP/s of all `devices` together; 0 if their kind is unknown."""
    accelerator = ACCELERATORS.get(devices[0].device_kind)
    return accelerator.peak_flops * len(devices) if accelerator else 0.0
