"""Adapters against peft: equal logits on the model of transformers, equal gradients, and its own files are read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import T, V, one_text
from test_peft_folder import Adapted

from llmjax.convert.architectures.table import ARCHITECTURES
from llmjax.convert.files.safetensors_header import read_header
from llmjax.convert.peft_folder import check_adapters
from llmjax.convert.verify import logits_of
from llmjax.ops.logits import head_logits
from llmjax.train.trees import flatten, nest

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def peft():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    pytest.importorskip("transformers").logging.set_verbosity_error()
    return pytest.importorskip("peft")


def theirs_in(folder):
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    arguments = {"dtype": torch.float32, "attn_implementation": "eager"}
    return getattr(transformers, ARCHITECTURES[name].opened_as).from_pretrained(folder, **arguments)


@pytest.mark.parametrize(
    "variant, lora",
    [
        *[(variant, {"rslora": rslora})
          for variant in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel")
          for rslora in (False, True)],
        ("MixtralForCausalLM", {"targets": ("attention",)}),
        # The names of the module that is adapted are the end of another one.
        ("BertForMaskedLM", {"targets": ("w_down", "w_DD")}),
        # Layers of the encoder have the names of those of the decoder.
        ("T5ForConditionalGeneration", {"targets": ("encoder", "source_attention")}),
    ],
)  # fmt: skip
def test_logits_and_gradients_are_those_of_peft(peft, tmp_path, variant, lora):
    import torch

    adapted = Adapted(tmp_path / "base", variant, **lora)
    folder = adapted.write(tmp_path / "adapters")
    theirs = peft.PeftModel.from_pretrained(theirs_in(tmp_path / "base"), folder, is_trainable=True).eval()
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T))
    seed_BTV = np.random.default_rng(1).normal(size=(2, T, V)).astype(np.float32)
    logits = logits_of(theirs, torch.as_tensor(tokens_BT))
    (logits * torch.as_tensor(seed_BTV)).sum().backward()

    base = adapted.source.read(adapted.shapes)
    trained = nest(adapted.arrays)

    def score(trained):
        params = adapted.tuning.join(trained, base)
        ours = head_logits(
            adapted.model.apply(params, one_text(tokens_BT)).hidden_BTD, adapted.model.head(params)
        )
        return jnp.sum(ours * seed_BTV), ours

    (_, ours), grads = jax.jit(jax.value_and_grad(score, has_aux=True))(trained)
    expected = logits.detach().numpy()
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-5 * np.abs(expected).max()
    # Gradients are written and compared as adapters are. Blocks of one matrix of theirs have gradients of their own.
    grads = flatten(jax.device_get(grads))
    adapted.pairs = {
        "/".join(path): (grads[*path, "A"], grads[*path, "B"]) for path in adapted.tuning.adapters
    }
    adapted.write(tmp_path / "gradients")
    found = {
        name: x.read()
        for name, x in read_header(tmp_path / "gradients" / "adapter_model.safetensors").items()
    }
    count = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        ours, gradient = found[name.replace(".default", "")], parameter.grad.numpy()
        # Zeros of lora_B beside its blocks do not train here.
        mask = ours != 0 if "c_attn.lora_B" in name else np.ones_like(ours, bool)
        assert np.abs(ours - gradient)[mask].max() <= 1e-5 * np.abs(gradient).max(), name
        count += 1
    assert count == len(found)


@pytest.mark.parametrize("variant", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_what_peft_saved_is_read(peft, tmp_path, variant):
    import torch

    targets = ("wq", "wk", "wv", "w_down")
    adapted = Adapted(tmp_path / "base", variant, targets=targets)
    names = (
        ["c_attn", "mlp.c_proj"]
        if variant.startswith("GPT2")
        else ["q_proj", "k_proj", "v_proj", "down_proj"]
    )
    lora = peft.LoraConfig(r=2, lora_alpha=6, target_modules=names, fan_in_fan_out=variant.startswith("GPT2"),
                           init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(theirs_in(tmp_path / "base"), lora).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    check_adapters(tmp_path / "adapters", adapted.lora, "lora.init_from")
    found = adapted.read(tmp_path / "adapters")
    trained = {
        (*path.split("/"), name): x
        for path, pair in found.items()
        for name, x in zip("AB", pair, strict=True)
    }
    params = adapted.tuning.join(nest(trained), adapted.source.read(adapted.shapes))
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T))
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens_BT)).logits.numpy()
    model = adapted.model
    ours = head_logits(model.apply(params, one_text(tokens_BT)).hidden_BTD, model.head(params))
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-5 * np.abs(expected).max()
