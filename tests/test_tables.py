"""Every choice is a table: a name that is in none raises, and a name that is added to one is what is computed with."""

import dataclasses
import importlib
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from param_axes import BY_NAME
from sections import block_section, optimizer_section, section

from configs import base
from configs.base import get_config
from llmjax.build.model import make_model
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.layout import layout
from llmjax.data.sources import compression, encoding, listing, reading, records
from llmjax.data.tokenizer import kinds, training
from llmjax.errors import UserError
from llmjax.evaluate.probes import sentences, suite
from llmjax.models.family import Family
from llmjax.models.gpt import GPT
from llmjax.models.table import FAMILIES
from llmjax.modes import dispatch
from llmjax.modes.table import MODES
from llmjax.nn import attention_choice, config, position, remat
from llmjax.nn.layers import MLP, Norm
from llmjax.ops import activation, norm, rope
from llmjax.ops.attention import sequence_attention
from llmjax.parallel import mesh
from llmjax.parallel.rules import Layout
from llmjax.plan.hlo import traffic
from llmjax.report import probe_charts
from llmjax.train.optim import clip, optimizer
from llmjax.train.optim.optimizers import muon, table
from llmjax.train.steering import batch_schedule, controller, spikes
from llmjax.train.update import engines, fused

BTD = jnp.zeros((1, 2, 8))
# As they are before a test adds another.
SECTIONS_OF_OPTIMIZERS = tuple(table.OPTIMIZERS)
TINY = config.resolve(block_section(num_layers=1, model_dim=8, num_heads=2))


class Reached(Exception):
    """What an added entry raises when it is used."""


def reach(*args, **settings):
    raise Reached


class Reaching:
    """An entry whose every attribute says that it was asked."""

    def __getattr__(self, name):
        raise Reached


def model(**changes):
    return GPT(dataclasses.replace(TINY, **changes), 16, 4)


def model_of_family(name):
    whole, derived = resolve_config(read_config(get_config().to_dict()), 1)
    whole = dataclasses.replace(whole, model=forced(whole.model, family=name))
    make_model(whole, derived, 16, Layout(mesh.make_mesh(whole.mesh, jax.devices()[:1])))


def kernel_call(name):
    sequence_attention.make_attend(name)(*(jnp.zeros((1, 2, 2, 4)),) * 3, None)


def bring(name):
    attend = sequence_attention.make_attend("blockwise", sequence_attention.Sharing(name, "seq", 2))
    attend(*(jnp.zeros((1, 2, 2, 4)),) * 3, None)


def flops(name):
    return model(activation=name).cost(1.0, 1.0, 4)


def kept(name):
    return remat.kept_width(name, (), remat.Widths(1, 2, 3, 4), 2)


def spike_limits(name):
    settings = dataclasses.replace(section("stability"))
    object.__setattr__(settings, "on_spike", name)
    return spikes.limits(settings, spikes.StabilityState())


def wanted(name):
    settings = section("controller")
    object.__setattr__(settings, "name", name)
    return controller.initial_state(settings, 2)


def optimizer_with(own=types.MappingProxyType({}), **changes):
    settings = forced(optimizer_section(), **changes)
    sections = {name: section(name) for name in SECTIONS_OF_OPTIMIZERS} | own
    made = optimizer.make_optimizer(settings, sections, 100, BY_NAME)
    made.hyperparameters(10.0, 1.0)
    made.init({"w_DF": jnp.zeros((2, 2))})


def decode_badly(name):
    rules = dataclasses.replace(reading.Reading(), on_bad_text=name)
    file = listing.SourceFile("a.txt", "a.txt", 1, "")
    if encoding.decode(b"\xff", file, rules, reading.ReadStats(), "a.txt", 0) is not None:
        raise Reached


# What is asked for -> (table, an entry to add, who looks a name up in it).
TABLES = {
    "family": (FAMILIES, Family(reach), model_of_family),
    "activation": (activation.ACTIVATIONS, activation.Activation(reach),
                   lambda name: MLP(dataclasses.replace(TINY, activation=name), Layout()).init(jax.random.key(0), BTD)),
    "activation, FLOPs": (activation.ACTIVATIONS, Reaching(), flops),
    "norm": (norm.NORMS, reach, lambda name: Norm(name, 1e-6).init(jax.random.key(0), BTD)),
    "position": (
        position.POSITIONS, Reaching(), lambda name: model(position=name)._rotations(jnp.zeros((1, 2), jnp.int32)),
    ),
    "rope_scaling": (rope.SCALINGS, Reaching(), lambda name: rope.frequencies(8, 1e4, name)),
    "remat": (remat.REMATS, Reaching(), lambda name: remat.remat(lambda x: x, name, ())),
    "remat, plan": (remat.REMATS, Reaching(), kept),
    "offload": (remat.OFFLOADS, Reaching(), lambda name: remat.remat(lambda x: x, "full", (name,))),
    "attention": (sequence_attention.ATTENTION, Reaching(),
                  lambda name: attention_choice.choose_kernel(name, "cpu", False)),
    "kernel": (sequence_attention.KERNELS, reach, kernel_call),
    "seq_attention": (sequence_attention.ALGORITHMS, reach, bring),
    "layout": (layout.LAYOUTS, Reaching(), lambda name: layout.RowLayout(name, 2).order(np.array([4]), 4)),
    "batch_schedule": (batch_schedule.SCHEDULES, reach,
                       lambda name: batch_schedule.BatchSchedule(name, ((0, 8),), 4).accumulation_steps(3)),
    "controller": (controller.RULES, Reaching(), wanted),
    "on_spike": (spikes.ON_SPIKE, Reaching(), spike_limits),
    "optimizer": (table.OPTIMIZERS, Reaching(), lambda name: optimizer_with(name=name)),
    "schedule": (optimizer.SCHEDULES, Reaching(), lambda name: optimizer_with(schedule=name)),
    "constant_in": (optimizer.CONSTANT_IN, reach, lambda name: optimizer_with(constant_in=name)),
    "muon.form": (muon.MUON_FORMS, reach,
                  lambda name: optimizer_with({"muon": forced(section("muon"), form=name)}, name="muon")),
    "clip": (clip.CLIPS, reach, lambda name: clip.make_clip(name, 1.0, BY_NAME)),
    "fused_gather": (fused.MANUAL, (), lambda name: fused.MANUAL[name]),
    "tokenizer kind": (kinds.KINDS, Reaching(),
                       lambda name: training.train_tokenizer(forced(section("tokenizer"), kind=name), ["a"])),
    "on_bad_text": (reading.BAD_TEXT, True, decode_badly),
    "language of a pass key": (sentences.PASS_KEYS, (reach, "", "", ""), lambda name: sentences.pass_key(name, 0)),
    "probe, words": (suite.WORDS, reach, lambda name: suite.describe({name: [1]})),
    "collective": (traffic.KINDS, Reaching(), lambda name: collective(name).sent_bytes),
    "collective, result": (traffic.KINDS, Reaching(), lambda name: collective(name).result_bytes),
}  # fmt: skip


def forced(settings, **changes):
    """Settings past their own check, as a caller would have them that forgot it."""
    for key, value in changes.items():
        object.__setattr__(settings, key, value)
    return settings


def collective(kind):
    names = [field.name for field in dataclasses.fields(traffic.Collective)]
    return traffic.Collective(**dict.fromkeys(names) | {"kind": kind, "operand_bytes": 8, "group_size": 2})


@pytest.mark.parametrize("case", TABLES)
def test_a_name_in_no_table_raises(case):
    _, _, use = TABLES[case]
    with pytest.raises((UserError, KeyError), match="never_heard_of"):
        use("never_heard_of")


@pytest.mark.parametrize("case", TABLES)
def test_a_name_that_is_added_is_what_is_computed_with(case, monkeypatch):
    table, entry, use = TABLES[case]
    monkeypatch.setitem(table, "never_heard_of", entry)
    if case == "fused_gather":
        assert use("never_heard_of") is entry
        return
    with pytest.raises(Reached):
        use("never_heard_of")


def test_a_compression_that_is_added_is_what_a_file_is_read_with(monkeypatch, tmp_path):
    """Files of other suffixes are read as they are."""
    (tmp_path / "a.lz").write_bytes(b"text")
    monkeypatch.setitem(compression.COMPRESSIONS, ".lz", (b"text", reach))
    (file,) = listing.list_sources([str(tmp_path / "a.lz")])
    with pytest.raises(Reached):
        list(records.read_records(file))


@pytest.mark.parametrize("key", config.CHOICES)
def test_a_choice_that_no_table_explains_raises(key, monkeypatch):
    """A name that is only allowed, as an activation once was that trained as another."""
    monkeypatch.setitem(config.CHOICES, key, (*config.CHOICES[key], "never_heard_of"))

    def make_and_apply():
        changed = config.resolve(dataclasses.replace(TINY, mlp_dim=0, **{key: "never_heard_of"}))
        gpt = GPT(changed, 16, 4)
        params = gpt.init(jax.random.key(0))
        gpt.decode(params, jnp.zeros((1, 2), jnp.int32), gpt.make_cache(1, 4))

    with pytest.raises((UserError, KeyError, TypeError), match="never_heard_of"):
        jax.eval_shape(make_and_apply)


NAMED = {
    **{f"transformer.{key}": table for key, table in config.CHOICES.items()},
    "model.dtype": config.DTYPES,
    "model.family": FAMILIES,
    "compute.offload": remat.OFFLOADS,
    "compute.remat": remat.REMATS,
    "compute.kernel": sequence_attention.ATTENTION,
    "tokenizer.kind": kinds.KINDS,
    "data.on_bad_text": reading.BAD_TEXT,
    "mesh.seq_attention": ("auto", *sequence_attention.ALGORITHMS),
    "mesh.layout": ("auto", *layout.LAYOUTS),
    "train.batch_schedule": batch_schedule.SCHEDULES,
    "compute.engine": engines.ENGINES,
    "compute.gather": fused.MANUAL,
    "optimizer.name": table.OPTIMIZERS,
    "optimizer.schedule": optimizer.SCHEDULES,
    "optimizer.batch_scaling": optimizer.BATCH_SCALING,
    "optimizer.constant_in": optimizer.CONSTANT_IN,
    "optimizer.clip": clip.CLIPS,
    "muon.form": muon.MUON_FORMS,
    "controller.name": controller.RULES,
    "stability.on_spike": spikes.ON_SPIKE,
    "evaluate.probes": suite.PROBES,
}


@pytest.mark.parametrize("key", NAMED)
def test_the_comments_of_base_name_all_that_a_table_has(key):
    found = re.search(rf"\n    {key} =.*?(?=\n    \w+\.\w+ =|\n\n)", inspect.getsource(base), re.S)
    comments = " ".join(re.findall("#.*", found[0]))
    assert [name for name in NAMED[key] if not re.search(rf"\b{name}\b", comments)] == []


def test_tables_of_one_noun_hold_the_same_names():
    """Where two rooms know a noun, one of which may not import the other."""
    assert ("auto", *sequence_attention.ALGORITHMS) == mesh.SEQ_ATTENTION
    assert ("auto", *layout.LAYOUTS) == mesh.LAYOUTS
    assert attention_choice.TRADED.keys() == sequence_attention.ALGORITHMS.keys()
    assert {name for kernels in sequence_attention.ATTENTION.values() for name in kernels.values()} == {
        "full",
        *sequence_attention.KERNELS,
    }
    assert suite.WORDS.keys() == suite.PROBES.keys() == probe_charts.CURVES.keys() | probe_charts.GRIDS.keys()
    assert sentences.PASS_KEYS.keys() == sentences.FACTS.keys() == probe_charts.LANGUAGES.keys()


def test_every_mode_has_a_file_that_runs_it_and_no_other_is_run(tmp_path):
    for name in MODES:
        assert callable(importlib.import_module(f"llmjax.modes.{name}").run)
    with pytest.raises(UserError, match="--mode='dance' is not known; use one of train, "):
        dispatch.run("dance", {}, tmp_path, prompts=(), checkpoint="latest")
