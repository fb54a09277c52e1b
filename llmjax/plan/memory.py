"""Checks that the state of a run fits into memory, before any of it is allocated."""

from __future__ import annotations

import os

from llmjax.build.program import Program
from llmjax.errors import UserError
from llmjax.plan.compile import available_memory
from llmjax.plan.summary import tree_bytes_per_device
from llmjax.quantities import format_bytes


def check_state_fits(program: Program) -> None:
    """Raises UserError if parameters and optimizer state need more memory than a device has.

    Devices of the CPU backend share the memory of their machine. This check leaves out what else a step needs, which
    `--mode=plan` finds out by compiling. Without it, a state that is far too large would end the process, on some
    machines without any message.
    """
    device, mesh = program.mesh.devices.flat[0], program.mesh
    local = sum(each.process_index == device.process_index for each in mesh.devices.flat)
    available = _machine_memory() // local if device.platform == "cpu" else available_memory(device)
    state = program.abstract_state()
    parameters, needed = (tree_bytes_per_device(tree) for tree in ((state.params, state.frozen), state))
    if program.config.compute.offload_optimizer and device.platform != "cpu":
        # The optimizer state lies in host memory.
        needed = parameters
    if available and needed > available:
        model = program.config.model
        raise UserError(
            f"model.num_layers={model.num_layers} and model.model_dim={model.model_dim} make a state of "
            f"{format_bytes(needed)} per device, {format_bytes(parameters)} of it parameters, but a device has "
            f"{format_bytes(available)} here; use a smaller model, more devices or a larger mesh.fsdp"
        )


def _machine_memory() -> int:
    """The bytes of memory and swap of this machine; 0 if unknown."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        # /proc/meminfo counts KiB.
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
