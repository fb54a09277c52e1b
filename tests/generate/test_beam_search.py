"""Beam search finds the likeliest text where it can look at all of them, and what transformers finds elsewhere."""

import dataclasses
import logging

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import V
from sections import section

from llmjax.errors import UserError
from llmjax.generate.beam_search import make_beam_search
from llmjax.generate.generate import make_generator, make_rows, read_prompts

ONE = section("generate", max_tokens=2, temperature=0.0, top_k=0, top_p=1.0, seed=0, num_beams=V)
EOS = 7
PROMPTS = [[1, 5, 9, 3], [2], [7, 30, 11]]
SOURCES = [[4, 6], [5, 5, 8, 20], [9]]
VARIANTS = ("gpt", "lstm", "encoder_decoder original")


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(request):
    """A model, its parameters and the sources it reads, of which other families have none."""
    model = families.make(request.param, model__init_std=0.5)
    return model, jax.jit(model.init)(jax.random.key(1)), SOURCES if "encoder" in request.param else None


def best_by_looking_at_all(model, params, prompt, source, penalty):
    """The best text of at most two tokens after a prompt, by its score."""
    rows = make_rows([prompt] * V, lambda n: 8)
    sources = None if source is None else make_rows([source] * V, lambda n: 8)
    logits, cache = jax.jit(lambda p: read_prompts(model, p, rows, sources, 8))(params)
    first = np.asarray(jax.nn.log_softmax(logits))[0]
    logits, _ = jax.jit(model.decode)(params, jnp.arange(V)[:, None], cache)
    both = first[:, None] + np.asarray(jax.nn.log_softmax(logits[:, 0]))
    both[EOS] = -np.inf
    a, b = np.unravel_index(np.argmax(both), both.shape)
    if first[EOS] > both[a, b] / 2**penalty:
        return []
    return [a] if b == EOS else [a, b]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_with_all_beams_the_best_text_is_found(loaded, penalty):
    model, params, sources = loaded
    search = make_beam_search(model, dataclasses.replace(ONE, length_penalty=penalty), eos_id=EOS)
    found = search(params, PROMPTS, sources)
    for i, prompt in enumerate(PROMPTS):
        source = sources and sources[i]
        assert found[i] == [best_by_looking_at_all(model, params, prompt, source, penalty)]


def test_a_prompt_is_searched_alone_as_among_others(loaded):
    model, params, sources = loaded
    config = dataclasses.replace(ONE, max_tokens=9, num_beams=3, num_samples=3)
    search = make_beam_search(model, config, eos_id=EOS)
    together = search(params, PROMPTS, sources)
    assert all(len(texts) == 3 for texts in together)
    for i, prompt in enumerate(PROMPTS):
        assert search(params, [prompt], sources and [sources[i]]) == [together[i]]


def test_one_beam_is_greedy_decoding(loaded):
    model, params, sources = loaded
    config = dataclasses.replace(ONE, max_tokens=9, num_beams=1)
    found = make_beam_search(model, config, eos_id=EOS, banned_ids=[3])(params, PROMPTS, sources)
    columns = make_generator(model, config, eos_id=EOS, banned_ids=[3])(params, PROMPTS, 0, sources)
    greedy = [[id for id in column if id is not None] for column in zip(*columns, strict=True)]
    assert [texts[0] for texts in found] == greedy


@pytest.mark.parametrize("changes, message", [
    ({"num_beams": 1, "length_penalty": 0.5}, "generate.length_penalty=0.5 is without effect for generate.num_beams=1"),
    ({"num_beams": 2, "num_samples": 3}, "generate.num_samples=3 is more than generate.num_beams=2"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ONE, **changes)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration gated tied", "MarianMTModel"]
)
@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (2, 1.0), (4, 0.5), (3, 2.0), (5, 0.0)])
def test_transformers_finds_the_same(name, beams, penalty, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.convert import random_models

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(beams + 1 * ("T5" in name))
    config = random_models.config_json(name)
    cls = getattr(transformers, name.split()[0])
    made = cls.config_class(**{key: value for key, value in config.items() if key != "architectures"})
    made.initializer_range = made.init_std = 0.5
    theirs = cls(made).eval()
    theirs.save_pretrained(tmp_path)
    ours = random_models.read(tmp_path)
    given = np.random.default_rng(beams).integers(3, random_models.V, (4, 5))
    # A model that reads a source begins with one id.
    prompts = np.zeros((4, 1), int) if made.is_encoder_decoder else given
    length = prompts.shape[1]
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    # Marian ends a text that is cut with an end of its own.
    theirs.generation_config.forced_eos_token_id = None
    if beams > 1:
        settings["length_penalty"] = penalty

    def continued(eos_id):
        ids = theirs.generate(torch.tensor(given), eos_token_id=eos_id, **settings)[:, length:].tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in ids]

    # An id that the model likes to write is made the end, so that texts end at all.
    eos_id = continued(random_models.V - 1)[0][:6][-1]
    config = dataclasses.replace(
        ONE, max_tokens=12, num_beams=beams, length_penalty=penalty if beams > 1 else 1.0
    )
    sources = given.tolist() if made.is_encoder_decoder else None
    found = make_beam_search(ours.model, config, eos_id=eos_id)(ours.params, prompts.tolist(), sources)
    expected = continued(eos_id)
    assert [texts[0] for texts in found] == expected
    assert penalty > 1 or any(len(ids) < 12 for ids in expected)
