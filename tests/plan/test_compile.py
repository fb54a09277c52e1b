"""The compiler's word on a step: for the devices at hand, and for TPUs that are not there."""

import importlib.util
import re

import pytest
import tiny_run
from tiny_run import BASE

from configs import base
from llmjax import config as configs
from llmjax import main
from llmjax.build import make_program
from llmjax.errors import UserError
from llmjax.plan.compile import compile_step, topology_devices
from llmjax.plan.summary import format_bytes, tree_bytes_per_device

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
    raw = base.get_config()
    raw.update_from_flattened_dict({**tiny_run.SETTINGS, "mesh.fsdp": 2})
    config, batch = configs.check(configs.read(raw.to_dict()), 8)
    program = make_program(config, batch, 64)
    rows = compile_step(program)
    arguments = tree_bytes_per_device((program.abstract_state(), program.abstract_batch()))
    assert re.fullmatch(r"in \d+ s", rows["compiled"])
    assert f"arguments {format_bytes(arguments)}" in rows["needs"]


def test_a_topology_that_does_not_exist_is_one_sentence():
    with pytest.raises(
        UserError, match=r"plan.topology='v5q:4x4' cannot be compiled for .* such as v5p:4x4x4"
    ) as error:
        topology_devices("v5q:4x4")
    assert "\n" not in str(error.value)


class TestAheadOfTime:
    pytestmark = tpu_aot

    @pytest.mark.parametrize("topology, count", [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4)])
    def test_a_topology_has_its_devices(self, topology, count):
        assert len(topology_devices(topology)) == count

    @pytest.mark.parametrize("first, second", [("data", "seq"), ("fsdp", "tensor")])
    def test_a_step_is_compiled_for_a_tpu_that_is_not_there(self, first, second, capsys):
        sizes = ("--config.model.num_layers=1", "--config.mesh.data=1")
        sizes += (f"--config.mesh.{first}=2", f"--config.mesh.{second}=2")
        code, out, err = plan(capsys, "v5e:2x2", *sizes)
        assert (code, err) == (0, "")
        assert f"{first}=2" in out and f"{second}=2" in out and "on 4 TPU v5 lite devices" in out
        assert re.search(r"compiled +in \d+ s", out)
        assert re.search(r"needs +[\d.]+ MB per device: arguments [\d.]+ MB, temporaries [\d.]+ [kM]?B", out)
        assert "corpus" not in out

    def test_a_step_that_does_not_fit_is_one_sentence_with_the_compilers_figures(self, capsys):
        sizes = (
            "--config.model.num_layers=1",
            "--config.model.model_dim=16384",
            "--config.model.num_heads=128",
        )
        code, _, err = plan(capsys, "v5e:2x2", *sizes)
        assert code == 2 and err.count("\n") == 1
        assert re.search(r"does not fit the devices' memory \(.*\d+\.\d+G.*15\.75G.*[^.]\); use", err), err
        assert "RESOURCE" not in err and "more devices, a larger mesh.fsdp" in err
