"""The compiler's word on a step: for the devices at hand, and for TPUs that are not there."""

import dataclasses
import importlib.util
import re

import jax
import pytest
import tiny_run
from tiny_run import BASE, DURATION

from configs import base
from llmjax import main
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.errors import UserError
from llmjax.plan import compile as compile_module
from llmjax.plan.compile import (
    ATTEMPTS,
    Need,
    compile_step,
    largest_that_fits,
    measure,
    smaller_micro_batches,
    with_micro_batch,
)
from llmjax.plan.summary import tree_bytes_per_device
from llmjax.plan.topology import topology_devices
from llmjax.quantities import format_bytes

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
tpu_aot = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed: pip install 'llmjax[tpu]'"),
]


def plan(capsys, topology, *words):
    """Exit code, stdout and stderr of planning for `topology`."""
    code = main.main(["llmjax", BASE, "--mode=plan", f"--config.plan.topology={topology}", *words])
    return code, *capsys.readouterr()


def test_the_step_is_compiled_for_the_devices_at_hand_without_running_it():
    program = make_tiny()
    rows = compile_step(program)
    arguments = tree_bytes_per_device((program.abstract_state(), program.placement.abstract_batch()))
    order = sum(x.dtype.itemsize for x in jax.tree.leaves(program.abstract_inputs()))
    assert re.fullmatch(f"in {DURATION}", rows["compiled"])
    assert f"arguments {format_bytes(arguments + order)}" in rows["needs"]


@pytest.mark.parametrize("fixed, slope, largest", [
    (0, 1, 96), (10, 1, 64), (90, 0.1, 96), (99, 0.5, 2), (99.5, 0.5, 1), (99.9, 0.5, 0), (0, 25, 4),
])  # fmt: skip
def test_the_largest_micro_batch_that_fits_is_found_in_few_compiles(fixed, slope, largest):
    sizes, tried = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96], []

    def need_of(size):
        tried.append(size)
        return Need(int(1000 * fixed), int(1000 * slope * size), 100_000)

    found = largest_that_fits(sizes, need_of, 192, Need(int(1000 * fixed), int(192_000 * slope), 100_000))
    assert (found, len(tried)) == ((largest, True), len(set(tried)))
    assert len(tried) <= 2


def test_memory_that_does_not_grow_evenly_is_searched_with_bounded_attempts():
    """A compiler recomputes what does not fit, so that need is no line."""
    sizes, tried = [2**i for i in range(16)], []

    def need_of(size):
        tried.append(size)
        return Need(0, min(size, 90) if size <= 2**11 else 2 * size, 100)

    size, is_largest = largest_that_fits(sizes, need_of, 2**16, Need(0, 2**15, 100))
    assert len(tried) == ATTEMPTS and not is_largest
    assert size in tried and need_of(size).fits


def make_tiny(devices=None, **changes):
    raw = base.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    raw.update_from_flattened_dict({**tiny_run.SETTINGS, "mesh.fsdp": 2, **changes})
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices or jax.devices()))
    return make_program(config, derived, 64, devices)


def test_smaller_micro_batches_cut_every_update_of_the_run():
    """8 devices; 96 sequences an update, or growing from 48."""
    cut = {
        "train__tokens_per_update": 96 * 32,
        "compute__micro_batch_size": 48,
        "compute__accumulation_steps": 0,
    }
    assert smaller_micro_batches(make_tiny(**cut)) == [8, 16, 24, 32]
    grows = {"train__batch_schedule": "piecewise", "train__batch_points": ("0:1536", "9000:3072")}
    assert smaller_micro_batches(make_tiny(**cut, **grows)) == [8, 16, 24]


def test_a_micro_batch_beyond_the_devices_memory_is_answered_with_the_largest_that_fits(monkeypatch):
    cut = {
        "train__tokens_per_update": 16 * 32,
        "compute__micro_batch_size": 16,
        "compute__accumulation_steps": 0,
    }
    program, lines = make_tiny(**cut), []
    needs = {size: measure(with_micro_batch(program, size)) for size in (8, 16)}
    available = needs[16].total - 1

    def measured(program):
        return dataclasses.replace(needs[program.batch.micro_batch_size], available=available)

    monkeypatch.setattr(compile_module, "measure", measured)
    with pytest.raises(UserError) as error:
        compile_step(program, lines.append)
    assert "compute.micro_batch_size=16 does not fit" in str(error.value)
    largest = (
        "the largest that fits is compute.micro_batch_size=8 (compute.accumulation_steps=2), or use more"
    )
    assert largest in str(error.value)
    assert lines[-1] == f"compute.micro_batch_size=8 fits: {format_bytes(needs[8].total)}"
    available += 1
    assert compile_step(program)["needs"].startswith(format_bytes(available))


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("first, second", [("data", "seq"), ("fsdp", "tensor")])
    def test_a_step_is_compiled_for_a_tpu_that_is_not_there(self, first, second, capsys):
        sizes = ("--config.model.num_layers=1", "--config.mesh.data=1")
        sizes += (f"--config.mesh.{first}=2", f"--config.mesh.{second}=2")
        code, out, err = plan(capsys, "v5e:2x2", *sizes)
        assert (code, err) == (0, "")
        assert f"{first}=2" in out and f"{second}=2" in out and "on 4 TPU v5 lite devices" in out
        assert re.search(f"compiled +in {DURATION}\n", out)
        assert re.search(r"needs +[\d.]+ MB per device: arguments [\d.]+ MB, temporaries [\d.]+ [kM]?B", out)
        assert "corpus" not in out

    def test_a_state_that_does_not_fit_is_one_sentence_with_the_compilers_figures(self, capsys):
        sizes = (
            "--config.model.num_layers=1",
            "--config.model.model_dim=16384",
            "--config.transformer.num_heads=128",
        )
        code, _, err = plan(capsys, "v5e:2x2", *sizes)
        assert code == 2 and err.count("\n") == 1
        assert re.search(
            r"does not fit the devices' memory \([\d.]+ GB of 16.9 GB per device\); its state", err
        ), err
        assert "RESOURCE" not in err and "use more devices, a larger mesh.fsdp" in err

    def test_a_micro_batch_that_does_not_fit_is_answered_with_the_largest_that_does(self):
        """2^15 sequences of 512 tokens an update on 4 devices."""
        cut = {
            "train__tokens_per_update": 2**15 * 512,
            "compute__micro_batch_size": 2**15,
            "compute__accumulation_steps": 0,
            "data__seq_len": 512,
        }
        program = make_tiny(topology_devices("v5e:2x2"), **cut, model__num_layers=1, model__model_dim=512)
        lines = []
        with pytest.raises(UserError) as error:
            compile_step(program, lines.append)
        found = re.search(
            r"largest that fits is compute.micro_batch_size=(\d+) \(compute.accumulation_steps=(\d+)\)",
            str(error.value),
        )
        assert found, error.value
        size, steps = map(int, found.groups())
        assert size * steps == 2**15 and size < 2**15
        tried = {
            int(n): "does not" not in line for line in lines[1:] for n in re.findall(r"size=(\d+)", line)
        }
        larger = min(n for n in range(size + 4, 2**15 + 1, 4) if 2**15 % n == 0)
        assert tried[size] and not tried.get(larger, False) and len(tried) <= 3
