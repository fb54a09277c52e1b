"""Runs whose sequences several devices share: as a user starts them, and equal to those of one device."""

import types

import pytest
import tiny_run
from tiny_run import BASE, command

from llmjax.build import program
from tests.modes.test_modes import compile_once, refuse, run  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    tiny_run.write_corpus(folder / "corpus")
    return folder


@pytest.mark.slow
def test_a_run_around_a_ring_with_all_that_saves_memory_is_that_of_one_device(folder, capsys):
    plain, long = folder / "plain", folder / "long"
    tiny_run.finish(tiny_run.start(command(folder, f"--workdir={plain}")))  # on one device
    saving = {
        "compute__remat": "attention", "compute__offload": "residual,attention", "compute__tile": 4,
        "compute__scan_layers": True, "compute__offload_optimizer": True,
    }  # fmt: skip
    ring = {"mesh__data": 2, "mesh__seq": 4, "mesh__seq_attention": "ring"}
    out = run(capsys, command(folder, f"--workdir={long}", **ring, **saving))
    assert "over mesh.seq ring (as mesh.seq_attention says), layout documents" in " ".join(out.split())
    assert tiny_run.losses(long) == pytest.approx(tiny_run.losses(plain), rel=1e-5)
    # and its checkpoints are the same: each goes on as the other did
    run(capsys, command(folder, f"--workdir={long}", train__num_updates=8))
    run(capsys, command(folder, f"--workdir={plain}", **ring, **saving, train__num_updates=8))
    assert tiny_run.losses(long) == pytest.approx(tiny_run.losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    "key, value", [("compute.offload_optimizer", "True"), ("compute.offload", "residual")]
)
def test_memory_that_the_devices_lack_is_one_sentence(key, value, folder, capsys, monkeypatch):
    device = types.SimpleNamespace(
        addressable_memories=lambda: [types.SimpleNamespace(kind="device")], platform="cpu"
    )
    check = program._check_host_memory

    def without(config, mesh):
        flat = types.SimpleNamespace(flat=[device])
        return check(config, types.SimpleNamespace(devices=flat))

    monkeypatch.setattr(program, "_check_host_memory", without)
    words = command(folder, f"--workdir={folder}/none", f"--config.{key}={value}", compute__remat="full")
    sentence = f"{key} needs memory of the kind 'pinned_host', which CPU devices do not have here; turn"
    assert sentence in refuse(capsys, words)


@pytest.mark.slow
def test_the_base_run_on_eight_devices_is_that_of_one(folder):
    """The base model on its text, whole documents around a ring of two groups of four, or of eight devices.

    It computes more than it compiles, so it is compiled as users compile it.
    """
    words = ["llmjax", BASE, "--config.train.num_updates=4", "--config.evaluate.every=0",
             f"--config.data.cache_dir={folder}/cache"]  # fmt: skip

    def losses(name, devices, *more):
        flags = f"--xla_force_host_platform_device_count={devices}"
        workdir = folder / name
        tiny_run.finish(tiny_run.start([*words, f"--workdir={workdir}", *more], XLA_FLAGS=flags))
        return tiny_run.losses(workdir)

    one = losses("one", 1)
    assert len(one) == 4
    for algorithm in ("auto", "ring"):
        mesh = {"data": 1, "seq": 8, "seq_attention": algorithm}
        more = (f"--config.mesh.{key}={value}" for key, value in mesh.items())
        assert losses(algorithm, 8, *more) == pytest.approx(one, rel=1e-5)
