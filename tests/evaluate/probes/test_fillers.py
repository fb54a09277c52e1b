"""Filler is the held-out text itself, by language."""

import pytest

from llmjax.evaluate.probes.fillers import fillers, language_of
from tests.evaluate.probe_text import TOKENIZER, chinese, spelled, text_of, words


@pytest.mark.parametrize("text, language", [
    ("the river and the stone", "en"), ("春江潮水连海平", "zh"), ("def f(x): return x", "en"), ("", "en"),
    ("12 34", "en"),
    ("用 pip install 安装 Python 的包", "en"), ("用 pip 安装这个包，然后运行测试。", "zh"), ("река и камень", "en"),
])  # fmt: skip
def test_the_language_is_told_by_its_letters(text, language):
    assert language_of(text) == language


def test_documents_of_a_language_are_joined_without_their_marks():
    text = text_of(spelled("ab cd", "春江", "ef"), 32)
    found = fillers(text, 100)
    assert {language: TOKENIZER.decode(ids.tolist()) for language, ids in found.items()} == {
        "en": "ab cdef",
        "zh": "春江",
    }
    assert not {TOKENIZER.bos_id, TOKENIZER.eos_id} & {int(i) for ids in found.values() for i in ids}


def test_a_language_of_little_text_is_left_out_and_long_documents_are_cut():
    text = text_of(spelled(words(200), chinese(5)), 32)
    assert list(fillers(text, 100)) == ["en"]
    long = text_of(spelled(words(2000)), 32)
    assert len(fillers(long, 200)["en"]) == 4 * 200
