"""Exported GGUF files in llama.cpp itself: the same probabilities for every family, and the same text and tokens.

llama.cpp runs in a process of its own, which may end without harm. The package xllamacpp brings it.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from random_models import VARIANTS, V, one_text, read, write
from test_gguf import CHANGES, READ

from llmjax.build.conversion import load_foreign, save_as_gguf
from llmjax.convert.gguf.export import Export
from llmjax.data.tokenizer.formats.byte_bpe import SPLITTINGS, definition
from llmjax.data.tokenizer.formats.gguf_vocabulary import gguf_facts
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer
from llmjax.data.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.interop
if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("llama.cpp is not installed (pip install xllamacpp)", allow_module_level=True)

# Keys and values are kept in float32, and attention is computed in it.
PROGRAM = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 512, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
for request in json.load(sys.stdin):
    print("ANSWER" + json.dumps(server.handle_completions({**request, "cache_prompt": False})), flush=True)
"""
# The largest difference of two log-probabilities. llama.cpp looks up the GELU of Gemma in a table in half precision.
TOLERANCE = {"gelu": 1e-2, "other": 1e-4}


def answers(path, requests):
    """What llama.cpp answers to requests about completions, with the model in a file."""
    words = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(words, input=json.dumps(requests), capture_output=True, text=True, timeout=120)
    lines = [line.removeprefix("ANSWER") for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(lines) == len(requests), done.stderr[-2000:]
    return list(map(json.loads, lines))


YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}


@pytest.mark.parametrize(
    "variant, others", [*((variant, {}) for variant in READ), ("Qwen3ForCausalLM", YARN)]
)
def test_a_family_has_the_same_probabilities_in_llama_cpp(tmp_path, variant, others):
    # llama.cpp wants rows of whole blocks.
    sizes = {"head_dim": 64} if "head_dim" in VARIANTS[variant] else {"hidden_size": 256}
    changes = {**CHANGES.get(variant, {}), **sizes, **others}
    if "query_pre_attn_scalar" in changes:
        changes["query_pre_attn_scalar"] = 64
    imported = read(write(tmp_path / "folder", variant, **changes))
    facts = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["a", "b", "ab", *map(str, range(V - 3))], "tokenizer.ggml.token_type": [1] * V,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    settings = dict(imported.source.settings)
    Export(settings, V, "float32", facts).write(tmp_path, imported.params)
    ids = np.random.default_rng(3).integers(0, V, (3, 24))
    requests = [{"prompt": row.tolist(), "max_tokens": 1, "logprobs": V} for row in ids]
    logits = imported.logits(one_text(ids))[:, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tolerance = TOLERANCE["gelu" if variant.startswith("Gemma") else "other"]
    for row, answer in zip(expected, answers(tmp_path / "model.gguf", requests), strict=True):
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        theirs = {entry["id"]: entry["logprob"] for entry in found}
        assert len(theirs) == V and np.ptp(row) > 1
        assert max(abs(theirs[i] - row[i]) for i in theirs) < tolerance


TEXTS = [
    "Once upon a time",
    "  two  spaces ",
    "\n\nlines\n",
    "你好 é x",
    "😀🏳️‍🌈",
    "1234567 3.14",
    "it's (a) test!",
]


def counted(path, tokenizer, adds_bos):
    """Asserts that llama.cpp cuts texts into as many tokens as `tokenizer`."""
    requests = [{"prompt": text, "max_tokens": 1} for text in TEXTS]
    for text, answer in zip(TEXTS, answers(path, requests), strict=True):
        assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(text)) + adds_bos, text


def test_stories260k_writes_in_llama_cpp_what_it_writes_upstream(shared_data, tmp_path):
    folder = shared_data / "weights" / "stories260K"
    model = load_foreign("llama2c", folder / "stories260K.bin")
    save_as_gguf(model, tmp_path / "gguf", "float32")
    request = {"prompt": [model.tokenizer.bos_id], "max_tokens": 199, "temperature": 0, "top_k": 1}
    (answer,) = answers(tmp_path / "gguf" / "model.gguf", [request])
    golden = (folder / "golden_greedy_200.txt").read_text().rstrip("\n")
    text = answer["choices"][0]["text"].strip()
    assert len(text) > 300 and golden.startswith(text[:300])
    counted(tmp_path / "gguf" / "model.gguf", model.tokenizer, adds_bos=True)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_byte_level_bpe_is_cut_into_as_many_tokens(shared_data, tmp_path, name):
    """The pieces of GPT-2, with each of the ways to split a text."""
    imported = read(write(tmp_path / "folder", "LlamaForCausalLM", vocab_size=50257, head_dim=64))
    gpt2 = load_tokenizer(shared_data / "tokenizers/gpt2")
    pieces, merges = map(gpt2.piece, range(50257)), json.loads(gpt2.definition)["model"]["merges"]
    tokenizer = JsonTokenizer(definition([*pieces], merges, SPLITTINGS[name], [50256]), gpt2.special)
    settings = dict(imported.source.settings)
    Export(settings, 50257, "float16", gguf_facts(tokenizer)).write(tmp_path, imported.params)
    counted(tmp_path / "model.gguf", tokenizer, adds_bos=False)
