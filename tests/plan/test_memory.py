"""A state that no machine can hold is a sentence before it is allocated."""

import jax
import pytest

from configs.base import get_config
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.errors import UserError
from llmjax.plan import memory
from llmjax.plan.memory import check_state_fits


def program_of(**model):
    raw = get_config().to_dict()
    for name, value in {"num_layers": 1, **model}.items():
        raw["model" if name in raw["model"] else "transformer"][name] = value
    config, derived = resolve_config(read_config(raw), 1)
    return make_program(config, derived, 512, jax.devices()[:1])


def test_a_state_beyond_the_memory_is_named_with_what_it_needs():
    for sizes in ({"model_dim": 2**20, "mlp_dim": 2**24}, {"mlp_dim": 2**24, "model_dim": 2**16}):
        with pytest.raises(
            UserError, match=r"^model.num_layers=1 and model.model_dim=.* per device.*; use a smaller"
        ):
            check_state_fits(program_of(**sizes))


def test_what_fits_goes_on_and_so_does_what_nobody_can_say(monkeypatch):
    check_state_fits(program_of())
    monkeypatch.setattr(memory, "_machine_memory", lambda: 1000)
    with pytest.raises(UserError, match="1 kB"):
        check_state_fits(program_of())
    monkeypatch.setattr(memory, "_machine_memory", lambda: 0)
    check_state_fits(program_of())
