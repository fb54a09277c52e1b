"""Runs a mode: makes the checks that all modes need, then calls the file of the mode."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llmjax.build.compiled_programs import reuse_programs
from llmjax.build.corpus import cache_directory
from llmjax.build.labels import with_labels
from llmjax.config.init_from import as_begun, check_initial
from llmjax.config.reading import read_config
from llmjax.config.resolve import make_examples, resolve_config
from llmjax.config.resume import check_resume, keep_choices
from llmjax.config.schema import Config
from llmjax.errors import UserError, choose
from llmjax.modes.request import Request
from llmjax.modes.table import MODES, Mode
from llmjax.parallel import hosts
from llmjax.parallel.agreement import check_same, together
from llmjax.parallel.host_memory import has_accelerator, keep_freed_memory
from llmjax.plan.topology import topology_devices
from llmjax.terminal.lines import warn
from llmjax.train.checkpoint.which import check_name
from llmjax.workdir import standing


def run(
    name: str,
    raw: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    prompts: Sequence[str],
    checkpoint: str,
    interactive: bool = False,
    references: pathlib.Path | None = None,
    profile: range = range(0),
    jsonl: bool = False,
    neighbours: Sequence[str] = (),
    table: pathlib.Path | None = None,
    questions: Sequence[pathlib.Path] = (),
    against: pathlib.Path | None = None,
) -> int:
    """Runs the mode `name`, a key of `MODES`, and returns the exit code. See `make_request` for what can be wrong."""
    request = make_request(name, raw, workdir, prompts=prompts, checkpoint=checkpoint)
    request = dataclasses.replace(
        request,
        interactive=interactive,
        references=references,
        profile=profile,
        jsonl=jsonl,
        neighbours=tuple(neighbours),
        table=table,
        questions=tuple(questions),
        against=against,
    )
    config = request.config
    with reuse_programs(cache_directory(config), config.compute.compilation_cache_mb):
        return importlib.import_module(f"llmjax.modes.{name}").run(request)


def make_request(
    name: str,
    raw: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    prompts: Sequence[str] = (),
    checkpoint: str = "latest",
) -> Request:
    """Reads and checks everything that the user asks for, before anything expensive starts.

    Args:
      name: the mode, a key of `MODES`.
      raw: the config as nested dicts.
      workdir: the folder of the run.
      prompts: texts to continue or to classify.
      checkpoint: `latest`, `best`, or the number of an update.

    Raises `UserError` for a mistake in the config or on the command line, for a workdir that the mode cannot use, and
    if the processes of a run were asked for different things.
    """
    started = time.perf_counter()
    mode = choose(MODES, "--mode", name)
    check_name("--checkpoint", checkpoint)
    config = read_config(raw)
    # This setting must be made before jax allocates memory, and `hosts` before jax looks for devices.
    if not has_accelerator():
        keep_freed_memory()
    hosts.initialize()
    on_topology = mode.for_topology and bool(config.plan.topology)
    devices = topology_devices(config.plan.topology) if on_topology else jax.devices()
    config, derived = resolve_config(config, len(devices))
    # For a named topology there is one process, and no workdir is looked at.
    if not on_topology:
        config = together(lambda: check_workdir(mode, config, workdir))
    # A mode that needs a run and nothing else reads no documents, and the config of a run has its labels.
    if mode.needs == "run":
        derived = dataclasses.replace(derived, examples=make_examples(config))
    else:
        config, derived = together(lambda: with_labels(config, derived))
    if not on_topology:
        seen = {"the config": f"one of digest {standing.digest_of(config.to_dict())}"}
        seen |= standing.describe(workdir, folders=name == "train")
        check_same(seen, "give every process the same command, and a --workdir on a disk that they share")
    return Request(config, derived, workdir, devices, tuple(prompts), checkpoint, started)


def check_workdir(mode: Mode, config: Config, workdir: pathlib.Path) -> Config:
    """Returns `config` as the mode goes on with it from what lies in `workdir`.

    Raises `UserError` if the mode cannot work with what lies there and with this config. A run that is there must have
    the same config in all that must not change, and a mode that needs a run or its parameters must find one.
    """
    check_initial(config, workdir)
    if mode.for_topology:
        return as_begun(config, workdir)
    saved = standing.config_of(workdir, warn)
    if saved is not None:
        config = keep_choices(saved, config, str(workdir))
        check_resume(saved, config, str(workdir))
    elif mode.needs == "run" or (mode.needs == "parameters" and not config.checkpoint.init_from):
        raise UserError(f"--workdir={workdir} holds no run; train there first, or give another --workdir")
    return config
