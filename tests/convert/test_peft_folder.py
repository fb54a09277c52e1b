"""Adapters in folders of peft, without peft: what they add to each tensor of theirs, and that they come back equal."""

import json

import jax
import numpy as np
import pytest
import random_models
from sections import section

from llmjax.convert import peft_folder
from llmjax.convert.files.safetensors_folder import save_tensors
from llmjax.convert.files.safetensors_header import read_header
from llmjax.convert.params import write_params
from llmjax.convert.peft_folder import (
    CONFIG,
    TENSORS,
    Settings,
    check_adapters,
    read_adapters,
    remarks,
    side_of,
    write_adapters,
)
from llmjax.convert.places import places_of
from llmjax.errors import UserError
from llmjax.train.trees import flatten, nest
from llmjax.train.tuning.tuning import make_tuning

EACH = pytest.mark.parametrize("variant", random_models.VARIANTS)


class Adapted:
    """A random model of ours with random adapters."""

    def __init__(self, folder, variant="GPT2LMHeadModel", **lora):
        self.source = random_models.read(random_models.write(folder, variant)).source
        self.model = random_models.model_of(self.source)
        self.config = section("lora", **{"rank": 2, "alpha": 6.0} | lora)
        self.lora = Settings(self.config.rank, self.config.alpha, self.config.rslora)
        self.shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        self.tuning = make_tuning(self.model.axes(), self.config, (), self.shapes)
        roles = {"/".join(path): adapter.role for path, adapter in self.tuning.adapters.items()}
        self.sides = {path: side_of(path, role.inputs, role.outputs) for path, role in roles.items()}
        rng = np.random.default_rng(0)
        trained, _ = jax.eval_shape(self.tuning.split, self.shapes, jax.random.key(0))
        self.arrays = {
            path: rng.normal(0, 0.1, x.shape).astype(np.float32) for path, x in flatten(trained).items()
        }
        self.pairs = {
            "/".join(path): (self.arrays[*path, "A"], self.arrays[*path, "B"])
            for path in self.tuning.adapters
        }

    def write(self, folder):
        folder.mkdir()
        write_adapters(
            folder, self.source.architecture, self.shapes, self.sides, self.pairs, self.lora, "base"
        )
        return folder

    def read(self, folder):
        return read_adapters(folder, self.source.architecture, self.shapes, self.sides, self.lora)


@EACH
@pytest.mark.parametrize("lora", [{"rslora": True}, {"targets": ("wk", "wv", "mlp")}], ids=["all", "some"])
def test_their_product_is_ours_in_each_tensor_and_what_is_read_is_what_was_written(tmp_path, variant, lora):
    if "num_experts_per_tok" in random_models.VARIANTS[variant]:
        # peft adapts no matrix of a mixture of experts.
        lora |= {"targets": ("attention",) if "rslora" in lora else ("wk", "wv")}
    adapted = Adapted(tmp_path / "base", variant, **lora)
    folder = adapted.write(tmp_path / "adapters")
    check_adapters(folder, adapted.lora, "lora.init_from")
    config, tensors = json.loads((folder / CONFIG).read_text()), read_header(folder / TENSORS)
    deltas = {
        path: adapted.tuning.adapters[tuple(path.split("/"))].product(*pair)
        for path, pair in adapted.pairs.items()
    }
    zero = {path: np.zeros(x.shape, np.float32) for path, x in flatten(adapted.shapes).items()}
    whole = {path: deltas.get("/".join(path), x) for path, x in zero.items()}
    places = {
        name: place
        for name, place in places_of(adapted.source.architecture, adapted.shapes).items()
        if any(part.path in adapted.pairs for part in place.parts)
    }
    assert len(tensors) == 2 * len(places)
    for name, expected in write_params(places, nest(whole), "float32"):
        module = f"{peft_folder.PREFIX}{name.removesuffix('.weight')}"
        a, b = (tensors[f"{module}.lora_{half}.weight"].read() for half in "AB")
        (target,) = (end for end in config["target_modules"] if f".{module}".endswith(f".{end}"))
        rank, alpha = (
            config[f"{kind}_pattern"].get(target, config[key])
            for kind, key in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        assert len(a) == rank
        found = alpha / (rank**0.5 if config["use_rslora"] else rank) * b @ a
        np.testing.assert_allclose(
            found.T if config["fan_in_fan_out"] else found, expected, rtol=1e-4, atol=1e-5
        )
    found = adapted.read(folder)
    assert found.keys() == adapted.pairs.keys()
    for path, pair in adapted.pairs.items():
        for x, y in zip(found[path], pair, strict=True):
            np.testing.assert_array_equal(x, y)


def test_one_adapter_for_several_of_our_matrices_is_read_as_one_for_each(tmp_path):
    adapted = Adapted(tmp_path / "base", targets=("wq", "wk", "wv"))
    folder, rng, shared = adapted.write(tmp_path / "adapters"), np.random.default_rng(1), {}
    for layer in range(3):
        module = f"{peft_folder.PREFIX}transformer.h.{layer}.attn.c_attn"
        shared[f"{module}.lora_A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
        shared[f"{module}.lora_B.weight"] = rng.normal(size=(48, 2)).astype(np.float32)
    save_tensors(shared, folder / TENSORS)
    damaged(folder, alpha_pattern={}, rank_pattern={})
    a, b = adapted.read(folder)["layers/attention/wk_DKH"]
    module = f"{peft_folder.PREFIX}transformer.h.1.attn.c_attn"
    np.testing.assert_array_equal(a[1], shared[f"{module}.lora_A.weight"].T)
    np.testing.assert_array_equal(b[1].reshape(2, 16), shared[f"{module}.lora_B.weight"][16:32].T)


def test_what_peft_does_not_adapt_is_refused_in_a_sentence(tmp_path):
    adapted = Adapted(tmp_path / "base", "MixtralForCausalLM")
    with pytest.raises(
        UserError, match="names layers/experts/w_down_EDF, and peft adapts no matrix of a mixture"
    ):
        adapted.write(tmp_path / "adapters")


def damaged(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("changes, message", [
    ({"r": 4}, "lora.rank=2, but .* has r=4; use that value"),
    ({"use_rslora": True}, "lora.rslora=False, but .* has use_rslora=True"),
    ({"use_dora": True}, "use_dora=True, which is not read here"),
    ({"peft_type": "IA3"}, "has peft_type='IA3' and bias='none', and only LORA"),
    ({"bias": "all"}, "bias='all', and only LORA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', so that its adapters belong to a mo"),
])  # fmt: skip
def test_adapters_of_other_settings_are_refused(tmp_path, changes, message):
    adapted = Adapted(tmp_path / "base")
    folder = adapted.write(tmp_path / "adapters")
    damaged(folder, **changes)
    with pytest.raises(UserError, match=message):
        check_adapters(folder, adapted.lora, "lora.init_from")


def test_dropout_that_the_adapters_had_is_mentioned(tmp_path):
    folder = Adapted(tmp_path / "base").write(tmp_path / "adapters")
    assert not remarks(folder)
    damaged(folder, lora_dropout=0.05)
    assert remarks(folder) == [
        f"{folder / CONFIG} has lora_dropout=0.05, and the adapters train without dropout here"
    ]


def test_adapters_of_other_matrices_are_refused(tmp_path):
    few, many = Adapted(tmp_path / "few", targets=("mlp",)), Adapted(tmp_path / "many")
    with pytest.raises(
        UserError, match=r"lacks the tensor .*attn.c_attn.lora_A.weight'; name in lora.targets"
    ):
        many.read(few.write(tmp_path / "a"))
    with pytest.raises(
        UserError, match=r"has the tensor .*attn.c_attn.lora_A.weight'; let lora.targets name"
    ):
        few.read(many.write(tmp_path / "b"))
    wider = Adapted(tmp_path / "wider", rank=3, alpha=9.0)
    with pytest.raises(UserError, match="which this model with lora.rank=2 does not have"):
        many.read(wider.write(tmp_path / "c"))
    damaged(folder := many.write(tmp_path / "d"), alpha_pattern={"c_attn": 18.0, "c_proj": 3.0})
    with pytest.raises(
        UserError, match=r"r=2 and lora_alpha=3.0, and all adapters are multiplied by the same"
    ):
        many.read(folder)
    with pytest.raises(UserError, match="does not hold adapter_config.json and adapter_model.safetensors"):
        check_adapters(tmp_path, many.lora, "lora.init_from")
