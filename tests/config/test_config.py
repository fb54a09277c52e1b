"""Every config file reads, every key has one owner, and every mistake gets one sentence with key, value and remedy."""

import ast
import dataclasses
import importlib
import json
import math
import pathlib
import re
import typing

import pytest
from sections import section

from llmjax.config.moved import MOVED, new_name
from llmjax.config.reading import complete_config, read_config, read_optimizer
from llmjax.config.resolve import resolve_config
from llmjax.config.resume import check_init, check_resume
from llmjax.config.schema import Config
from llmjax.errors import UserError
from llmjax.flags import parse, set_key
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ranges import unset
from llmjax.train.optim.optimizers.table import OPTIMIZERS
from llmjax.workdir.contents import write_json

# The keys that the config.json of every version has: a file without one of them is damaged.
FIRST_KEYS = {
    "": "seed",
    "model": "family num_layers model_dim tie_embeddings logit_softcap dropout init_std dtype",
    "transformer": "num_heads num_kv_heads head_dim mlp_dim activation norm norm_eps position rope_theta qk_norm "
    "use_bias",
    "tokenizer": "kind path vocab_size train_bytes character_coverage num_reserved",
    "data": "sources text_field on_bad_text seq_len held_out_fraction cache_dir num_workers prefetch",
    "mesh": "data fsdp seq tensor",
    "compute": "micro_batch_size accumulation_steps scan_layers remat kernel",
    "train": "num_updates tokens_per_update z_loss",
    "optimizer": "name learning_rate schedule warmup_updates final_lr_fraction decay_fraction weight_decay clip_norm",
    "evaluate": "every batch_size",
    "checkpoint": "every keep keep_best",
    "generate": "max_tokens temperature top_k top_p seed",
    "plan": "topology",
}
ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def load(name="base", **changes):
    raw = importlib.import_module(f"configs.{name}").get_config()
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (raw[section] if section else raw)[leaf] = value
    return raw.to_dict()


def check(num_devices=1, **changes):
    return resolve_config(read_config(load(**changes)), num_devices)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_reads(name):
    config = read_config(load(name))
    resolve_config(config, math.prod(map(int, re.findall(r"\d+", config.plan.topology.partition(":")[2]))))


def test_base_lists_every_key_with_a_comment():
    text = (ROOT / "configs" / "base.py").read_text(encoding="utf-8")
    for name, hint in typing.get_type_hints(Config).items():
        if not dataclasses.is_dataclass(hint):
            continue
        for field in dataclasses.fields(hint):
            assert re.search(rf"\b{name}\.{field.name} = [^\n]*", text), f"{name}.{field.name}"
    assignments = re.findall(r"^    \w+\.(\w+) = (?!.*ConfigDict)(.*)$", text, re.M)
    for key, rest in assignments:
        assert "#" in rest, f"{key} has no comment"


def test_base_alone_has_the_defaults():
    """Apart from what models and checkpoints take that are made without a config."""
    for name, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls) and name != "checkpoint":
            for field in dataclasses.fields(cls):
                beside = field.default is not dataclasses.MISSING
                assert beside == (name == "compute" and field.name in LayerCompute.__dataclass_fields__), (
                    field.name
                )


def test_the_resolved_config_survives_json():
    config, _ = check()
    assert read_config(json.loads(json.dumps(config.to_dict()))) == config


BAD = {
    "window": (
        {"transformer__window": 513},
        r"transformer.window=513 is longer than data.seq_len=512; use at most 512",
    ),
    "head split": (
        {"transformer__num_heads": 3},
        r"transformer.num_heads=3 does not divide model.model_dim=128",
    ),
    "group split": (
        {"transformer__num_kv_heads": 3},
        r"transformer.num_heads=4 must be a multiple of transformer.num_kv_heads=3",
    ),
    "choice": (
        {"transformer__activation": "swigloo"},
        r"transformer.activation='swigloo' is not known; use one of swiglu",
    ),
    "family": ({"model__family": "gtp"}, r"model.family='gtp' is not known; use one of gpt"),
    "dropout": ({"model__dropout": 1.5}, r"model.dropout=1.5"),
    "not closing": ({"train__tokens_per_update": 8000}, r"train.tokens_per_update=8000 .* data.seq_len=512"),
    "product": (
        {"compute__micro_batch_size": 3},
        r"compute.micro_batch_size=3 x compute.accumulation_steps=2",
    ),
    "sources": ({"data__sources": ()}, r"data.sources"),
    "bad text": ({"data__on_bad_text": "ignore"}, r"data.on_bad_text='ignore'"),
    "schedule": ({"optimizer__schedule": "cosin"}, r"optimizer.schedule='cosin'"),
    "temperature": ({"generate__temperature": -1.0}, r"generate.temperature=-1.0"),
    "top_p": ({"generate__top_p": 0.0}, r"generate.top_p=0.0"),
    "evaluate": ({"evaluate__every": -1}, r"evaluate.every=-1"),
    "probe": (
        {"evaluate__probes": ("position", "pasky")},
        r"evaluate.probes has 'pasky', .*did you mean 'passkey'",
    ),
    "strange probe": (
        {"evaluate__probes": ("xyz",)},
        r"evaluate.probes has 'xyz', .* use some of position, context",
    ),
    "probe length": (
        {"evaluate__probe_lengths": (16, 0)},
        r"evaluate.probe_lengths=\(16, 0\) has 0, which must be at least 1",
    ),
    "long probe": (
        {"evaluate__probe_lengths": (512, 513), "transformer__position": "learned"},
        r"evaluate.probe_lengths has 513, but transformer.position='learned' .* data.seq_len=512 .*use at most 512",
    ),
    "nothing to probe": (
        {"evaluate__probes": ("copy",), "data__held_out_fraction": 0.0},
        r"evaluate.probes=\('copy',\) need held-out documents but data.held_out_fraction=0 leaves none",
    ),
    "keep": ({"checkpoint__keep": 0}, r"checkpoint.keep=0"),
    "vocabulary": ({"tokenizer__vocab_size": 100}, r"tokenizer.vocab_size = 100"),
    "layout": (
        {"mesh__layout": "zigzig"},
        r"mesh.layout='zigzig' is not known; use one of auto, contiguous, zigzag",
    ),
    "unread": (
        {"lion__beta2": 0.99},
        "lion.beta2=0.99 is without effect for optimizer.name='muon'; set optimizer.name=lion, or leave lion.beta2 at",
    ),
    "z_loss": ({"train__z_loss": -0.1}, r"train.z_loss=-0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_value_is_named(case):
    changes, pattern = BAD[case]
    with pytest.raises(UserError, match=pattern) as error:
        check(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, pattern", [
    ({"mesh__seq": 3, "mesh__data": -1}, r"mesh .*seq=3.* 8 devices"),
    ({"mesh__seq": 8, "data__seq_len": 516, "train__tokens_per_update": 516 * 16}, r"data.seq_len=516 .* mesh.seq=8"),
    ({"mesh__seq": 8, "mesh__seq_attention": "ring", "mesh__layout": "zigzag", "data__seq_len": 520,
      "train__tokens_per_update": 520 * 16},
     r"data.seq_len=520 is not divisible by 2 x mesh.seq=8, which mesh.layout='zigzag' needs"),
    ({"mesh__tensor": 8}, r"transformer.num_heads=4 is not divisible by mesh.tensor=8"),
    ({"mesh__data": 4}, r"takes 4 devices but there are 8"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, r"mesh.data=-1 and mesh.fsdp=-1"),
    ({"compute__accumulation_steps": 2}, r"compute.micro_batch_size=4 is not divisible by the 8 shards"),
    ({"evaluate__batch_size": 3, "compute__accumulation_steps": 1}, r"evaluate.batch_size=3 is not .* the 8 shards"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_named(changes, pattern):
    with pytest.raises(UserError, match=pattern):
        check(num_devices=8, **changes)


def test_unknown_missing_and_mistyped_keys_are_named():
    raw = load()
    raw["model"]["num_layer"] = 3
    with pytest.raises(UserError, match="model.num_layer is not known; did you mean 'num_layers'"):
        read_config(raw)
    raw = load()
    del raw["adamw"]["beta1"]
    with pytest.raises(UserError, match="adamw.beta1 is missing"):
        read_config(raw)
    for value in ("4", 4.5, True, None):
        raw = load()
        raw["model"]["num_layers"] = value
        with pytest.raises(UserError, match="model.num_layers=.* give a value of type int"):
            read_config(raw)


def test_sources_may_be_one_string_or_many():
    for value, expected in (
        ("a.txt", ("a.txt",)),
        ("a.txt,b.txt", ("a.txt", "b.txt")),
        (("a", "b"), ("a", "b")),
    ):
        raw = load()
        raw["data"]["sources"] = value
        assert read_config(raw).data.sources == expected


def test_lengths_may_be_whole_numbers_or_their_texts():
    for value, expected in (
        (64, (64,)),
        ("64,128", (64, 128)),
        (("64", "128"), (64, 128)),
        ((64, 128), (64, 128)),
        ((), ()),
    ):
        raw = load()
        raw["evaluate"]["probe_lengths"] = value
        assert read_config(raw).evaluate.probe_lengths == expected
    for value in ("64k", 1.5, (True,), None):
        raw = load()
        raw["evaluate"]["probe_lengths"] = value
        with pytest.raises(
            UserError, match="evaluate.probe_lengths=.* give a value of type list of whole numbers"
        ):
            read_config(raw)


def test_lengths_beyond_seq_len_are_allowed_where_positions_have_no_end():
    for position in ("rope", "sinusoidal"):
        check(transformer__position=position, evaluate__probe_lengths=(1024,))


def test_a_resumed_run_must_mean_the_same():
    saved = check()[0].to_dict()
    for free in (
        {"train__num_updates": 900},
        {"compute__accumulation_steps": 4},
        {"evaluate__every": 7},
        {"compute__remat": "full"},
        {"mesh__layout": "documents"},
    ):
        check_resume(saved, check(**free)[0], "runs/base")
    with pytest.raises(UserError, match=r"model.num_layers \(4 there, 8 here\), seed \(0 there, 1 here\)"):
        check_resume(saved, check(model__num_layers=8, seed=1)[0], "runs/base")


def saved_keys():
    return [(section, key) for section, keys in load().items() if isinstance(keys, dict) for key in keys]


def saved_run(tmp_path, **changes):
    saved = check(**changes)[0].to_dict()
    write_json(tmp_path / "config.json", saved)
    return saved


@pytest.mark.parametrize("section, key", [("", "seed"), *saved_keys()])
def test_an_older_run_that_lacks_a_key_takes_its_default_or_is_named(section, key, tmp_path):
    saved = saved_run(tmp_path)
    asked = read_config(saved)
    owner = saved[section] if section else saved
    del owner[key]
    name = f"{section}.{key}" if section else key
    write_json(tmp_path / "config.json", saved)
    words = ["llmjax", f"--workdir={tmp_path}", "--config.seed=3"]
    if key in FIRST_KEYS.get(section, "").split():
        with pytest.raises(UserError, match=rf"config.json lacks the key {re.escape(name)}, .*; restore"):
            parse(words)
        with pytest.raises(UserError, match=rf"lacks the key {re.escape(name)},"):
            check_resume(saved, asked, str(tmp_path))
        return
    older = unset(typing.get_type_hints(Config)[section])
    assert key in older, f"{name} is new and does not say what older runs did"
    completed = read_config(parse(words)[1])
    default = dataclasses.replace(getattr(asked, section), **{key: older[key]})
    assert getattr(completed, section) == default
    # The default is compared, not nothing: the same is no other run, and another value is.
    expected = dataclasses.replace(asked, **{section: default})
    check_resume(saved, expected, str(tmp_path))
    check_init(saved, expected)


def test_an_older_run_that_lacks_sections_takes_their_defaults(tmp_path):
    saved = saved_run(tmp_path)
    for name in ("controller", "stability"):
        del saved[name]
    write_json(tmp_path / "config.json", saved)
    config = read_config(parse(["llmjax", f"--workdir={tmp_path}", "--config.controller.k_max=9"])[1])
    assert config.controller == section("controller", k_max=9) and config.stability == section("stability")


def test_a_changed_value_of_a_key_that_the_run_is_older_than_is_named_with_its_default(tmp_path):
    saved = saved_run(tmp_path)
    del saved["transformer"]["window"], saved["optimizer"]["clip"]
    config = check(transformer__window=8, optimizer__clip="block")[0]
    with pytest.raises(
        UserError, match=r"optimizer.clip \('global' there, 'block' here\), transformer.window \(0 there"
    ):
        check_resume(saved, config, str(tmp_path))
    del saved["transformer"]["attention_sinks"]
    with pytest.raises(UserError, match=r"transformer.attention_sinks=True, but .* has False"):
        check_init(saved, check(transformer__attention_sinks=True)[0])


def test_a_run_of_a_newer_version_is_named_by_its_key(tmp_path):
    saved = saved_run(tmp_path)
    saved["model"]["experts"] = 8
    write_json(tmp_path / "config.json", saved)
    pattern = (
        "config.json has the key model.experts, which this version of llmjax does not know.*use the version"
    )
    with pytest.raises(UserError, match=pattern):
        parse(["llmjax", f"--workdir={tmp_path}"])
    for reader in (
        lambda: check_resume(saved, check()[0], str(tmp_path)),
        lambda: check_init(saved, check()[0]),
        lambda: read_optimizer(saved, tmp_path),
    ):
        with pytest.raises(UserError, match="has the key model.experts"):
            reader()
    for broken in ({"model": 3}, {"model": None}, {"optimizer": [1]}):
        with pytest.raises(UserError, match=f"{next(iter(broken))}=.* is no section of keys"):
            complete_config({**check()[0].to_dict(), **broken}, tmp_path)


def test_a_config_file_still_has_every_key(tmp_path):
    for name, key in saved_keys():
        raw = load()
        del raw[name][key]
        with pytest.raises(UserError, match=rf"{name}.{key} is missing; start from configs/base.py"):
            read_config(raw)


def test_every_key_that_moved_is_read_under_its_old_name_and_told_by_its_new_one(tmp_path):
    # A key that came after the section has the value for runs that did not have it yet.
    newer = {"compilation_cache_mb": 0}
    changes = {"compute__engine": "fused", "compute__remat": "full", "compute__micro_batch_size": 4}
    saved = check(**changes, **{f"compute__{key}": value for key, value in newer.items()})[0].to_dict()
    old = {name: dict(values) if isinstance(values, dict) else values for name, values in saved.items()}
    for before in MOVED:
        if (now := new_name(before, saved["optimizer"]["name"])) is None:
            continue
        (section, key), (new_section, new_key) = before.split("."), now.split(".")
        old[section][key] = old[new_section].pop(new_key)
        with pytest.raises(UserError, match=re.escape(f"did you mean --config.{now}?")):
            set_key(saved, before, ["1"])
    assert old.pop("compute") == newer
    assert complete_config(old, tmp_path) == saved


# What an optimizer made of the keys that were once those of all optimizers.
ONCE_SHARED = {
    "adamw": {"adamw": {"beta1": 0.8, "beta2": 0.7, "eps": 1e-6}},
    "lion": {"lion": {"beta1": 0.8, "beta2": 0.7}},
    "adafactor": {"adafactor": {"momentum": 0.8, "decay_cap": 0.7}},
    "muon": {"adamw": {"beta1": 0.8, "beta2": 0.7, "eps": 1e-6}, "muon": {"form": "reference"}},
    "schedule_free_adamw": {"schedule_free_adamw": {"beta1": 0.8, "beta2": 0.7, "eps": 1e-6}},
}


@pytest.mark.parametrize("name", ONCE_SHARED)
def test_the_run_of_an_older_version_keeps_the_keys_of_its_optimizer(name, tmp_path):
    saved = check(optimizer__name=name, optimizer__schedule="constant")[0].to_dict()
    new = saved | {section: saved[section] | values for section, values in ONCE_SHARED[name].items()}
    old = {section: values for section, values in saved.items() if section not in OPTIMIZERS}
    old["optimizer"] = old["optimizer"] | {"beta1": 0.8, "beta2": 0.7, "eps": 1e-6, "muon_form": "reference"}
    write_json(tmp_path / "config.json", old)
    _, completed = parse(["llmjax", f"--workdir={tmp_path}", "--config.generate.seed=0"])
    assert completed == new == complete_config(old, tmp_path)
    config = resolve_config(read_config(completed), 1)[0]
    check_resume(old, config, str(tmp_path))
    check_init(old, config)
    assert read_optimizer(old, tmp_path)[name] == config.optimizers[name]


@pytest.mark.parametrize("name", ONCE_SHARED)
def test_a_command_line_with_a_key_that_all_optimizers_shared_is_told_the_key_of_its_own(name):
    for before in ("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.muon_form"):
        now = new_name(before, name)
        hint = (
            f"did you mean --config.{now}?"
            if now
            else f"optimizer.name='{name}' never read it, so leave it out"
        )
        words = [f"--config.{before}=0.5", f"--config.optimizer.name={name}"]  # which comes last
        with pytest.raises(UserError, match=re.escape(f"--config.{before} is not known; {hint}")):
            parse(["llmjax", f"--config={ROOT / 'configs' / 'base.py'}", *words])


@pytest.mark.parametrize("old, hint", [
    ("optimizer.eps", "'eps', which is not known; it has moved to adamw.eps or schedule_free_adamw.eps"),
    ("model.remat", "'remat', which is not known; it has moved to compute.remat"),
])  # fmt: skip
def test_a_config_file_with_a_key_that_moved_is_told_where(old, hint, tmp_path):
    base = (ROOT / "configs" / "base.py").read_text(encoding="utf-8")
    path = tmp_path / "mine.py"
    path.write_text(base.replace("return c.lock()", f"c.lock()\n    c.{old} = 1\n    return c"))
    with pytest.raises(UserError, match=re.escape(hint)):
        parse(["llmjax", f"--config={path}"])


def test_every_new_name_of_a_key_is_a_key():
    known = load()
    for targets in MOVED.values():
        for name in targets.values() if isinstance(targets, dict) else (targets,):
            section, key = name.split(".")
            assert key in known[section]


def test_base_leaves_the_keys_of_every_optimizer_at_what_unread_keys_must_be():
    for name in OPTIMIZERS:
        check(optimizer__name=name, optimizer__schedule="constant")


@pytest.mark.parametrize("path", sorted((ROOT / "llmjax").rglob("*.py")), ids=lambda path: path.name)
def test_the_keys_that_sentences_name_are_keys_of_the_config(path):
    """A key that has moved, and that a message still calls by its old name, sends its reader to nothing."""
    known = load()
    sections = "|".join(name for name, values in known.items() if isinstance(values, dict))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for section, key in re.findall(rf"(?<![\w./])({sections})\.([a-z_0-9]+)=", node.value):
                assert key in known[section], f"{section}.{key}"
