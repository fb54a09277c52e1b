"""Pairs of answers become two streams that begin alike, and weight lies on the preferred answer alone."""

import json

import pytest

from llmjax.data.chat.formats import make_format
from llmjax.data.chat.messages import Message
from llmjax.data.examples.conversations import Conversations
from llmjax.data.examples.preferences import Preferences
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.errors import UserError
from tests.data.chat.test_template import TEMPLATES, Marked

TOKENIZER = ByteTokenizer(16)
SYSTEM, USER, ASSISTANT = TOKENIZER.reserved_ids[:3]
PAIRS = Preferences("chosen", "rejected", "prompt", "plain", "")
WHOLE = Preferences("chosen", "rejected", "", "plain", "be brief")


def talk(*messages):
    return json.dumps([{"role": role, "content": text} for role, text in messages], ensure_ascii=False)


def test_both_texts_are_the_prompt_an_answer_and_its_end():
    example = PAIRS.encode({"prompt": "hi", "chosen": "你好", "rejected": "no"}, TOKENIZER)
    prompt = [TOKENIZER.bos_id, USER, *TOKENIZER.encode("hi"), ASSISTANT]
    assert example.tokens == [*prompt, *TOKENIZER.encode("你好"), TOKENIZER.eos_id]
    assert example.source == [*prompt, *TOKENIZER.encode("no"), TOKENIZER.eos_id]
    assert example.weights == ((len(prompt), 0.0), (len(TOKENIZER.encode("你好")) + 1, 1.0))


def test_the_same_pair_in_three_forms_is_the_same_example():
    before = (("user", "hi"), ("assistant", "yes?"), ("user", "go on"))
    good, bad = ("assistant", "[1, 2]"), ("assistant", "no")
    expected = PAIRS.encode({"prompt": talk(*before), "chosen": "[1, 2]", "rejected": "no"}, TOKENIZER)
    apart = {"prompt": talk(*before), "chosen": talk(good), "rejected": talk(bad)}
    assert PAIRS.encode(apart, TOKENIZER) == expected
    whole = {"chosen": talk(*before, good), "rejected": talk(*before, bad)}
    alone = Preferences("chosen", "rejected", "", "plain", "")
    assert alone.encode(whole, TOKENIZER) == expected
    # All forms of a prompt decide alike whether a pair is held out.
    assert alone.decisive(whole) == PAIRS.decisive(apart) == PAIRS.decisive({**apart, "rejected": "another"})
    # Conversations that begin with the prompt that has a field of its own as well do not say it twice.
    assert PAIRS.encode({"prompt": talk(*before), **whole}, TOKENIZER) == expected
    # What both begin with is what a conversation begins with.
    talks = Conversations("chosen", "plain", "").encode(whole, TOKENIZER)
    assert talks.tokens == expected.tokens


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma", "tagged"])
def test_answers_are_what_the_template_makes_of_them(name):
    tokenizer = Marked(TEMPLATES[name])
    pairs = Preferences("chosen", "rejected", "prompt", "template", "")
    example = pairs.encode({"prompt": "hi", "chosen": "good", "rejected": "bad"}, tokenizer)
    for answer, ids in (("good", example.tokens), ("bad", example.source)):
        whole, runs, _ = make_format("template", tokenizer).encode(
            [Message("user", "hi"), Message("assistant", answer)]
        )
        learned = [count for count, weight in runs if weight]
        end = runs[0][0] + learned[0]
        assert len(learned) == 1 and list(ids) == whole[:end]
        assert example.weights[0] == runs[0]


def test_a_system_message_stands_before_all():
    answers = {"chosen": "b", "rejected": "c"}
    record = {name: talk(("user", "a"), ("assistant", text)) for name, text in answers.items()}
    example = WHOLE.encode(record, TOKENIZER)
    assert example.tokens[:2] == [TOKENIZER.bos_id, SYSTEM]
    assert WHOLE.texts(record) == ["be brief", "a", "b", "c"]


@pytest.mark.parametrize("pairs, record, message", [
    (PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}, "both answers of a pair are 'b'"),
    (PAIRS, {"prompt": "a", "chosen": " ", "rejected": "b"}, "the field 'chosen' of a pair has no text"),
    (PAIRS, {"prompt": " ", "chosen": "a", "rejected": "b"}, "the field 'prompt' of a pair has no text"),
    (PAIRS, {"prompt": "a", "chosen": '["b"]', "rejected": "c"}, "a list of texts that does not say who says them"),
    (PAIRS, {"prompt": "a", "chosen": talk(("user", "b")), "rejected": "c"}, "ends with messages of 'user' and"),
    (PAIRS, {"prompt": "a", "chosen": talk(("poet", "b")), "rejected": "c"}, "no role of system, user, assistant"),
    (WHOLE, {"chosen": "a", "rejected": "b"}, "a pair has no prompt before its answer 'a'; name its field"),
    (WHOLE, {"chosen": talk(("user", "a"), ("assistant", "b")),
             "rejected": talk(("user", "x"), ("assistant", "c"))}, "differ before their last messages"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(pairs, record, message):
    with pytest.raises(UserError, match=message):
        pairs.check(record)
