"""Peaks of known devices, and silence about unknown ones."""

import types

import jax

from llmjax.parallel.devices import ACCELERATORS, peak_flops


def devices(kind, count):
    return [types.SimpleNamespace(device_kind=kind)] * count


def test_the_peak_is_that_of_all_devices_together():
    assert peak_flops(devices("TPU v5p", 64)) == 64 * 459e12
    assert peak_flops(devices("NVIDIA H200", 1)) == 989e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops(devices("TPU v99", 8)) == 0.0
    assert peak_flops(jax.devices()) == 0.0


def test_the_figures_have_the_size_of_accelerators():
    for kind, accelerator in ACCELERATORS.items():
        assert 1e14 < accelerator.peak_flops < 1e16, kind
        assert 15e9 < accelerator.memory < 1e12, kind
