"""Chat templates: written as transformers writes them, with marks that no message can spell, and within limits."""

import json
import pathlib
import time

import pytest

from llmjax.data.chat.formats import make_format
from llmjax.data.chat.messages import Message
from llmjax.data.chat.template import MOST_STEPS, Template, TemplateError
from llmjax.data.chat.template_format import TemplateFormat
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.errors import UserError

# Templates in the ways of Llama 3, Gemma, Mistral and of models with tags around what the assistant writes.
FILES = sorted(pathlib.Path(__file__).parent.glob("*.jinja"))
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in FILES}
TALK = [
    Message("user", "hi 你好"), Message("assistant", "hello  there"),
    Message("user", "bye\n\nnow"), Message("assistant", "再见"),
]  # fmt: skip
SYSTEM = Message("system", "be brief")


class Marked(ByteTokenizer):
    """A byte tokenizer whose special ids have names."""

    NAMES = ("<|start|>", "<|end|>", "<|eot|>")

    def __init__(self, template):
        super().__init__(16)
        self.chat_template = template

    def piece(self, i):
        named = dict(zip(self.reserved_ids, self.NAMES, strict=False)) | {
            self.bos_id: "<s>",
            self.eos_id: "</s>",
        }
        return named.get(i, f"piece {i}")


def spelled(tokenizer, ids):
    """The text of ids, in which special ones have their names."""
    return "".join(
        tokenizer.piece(i) if not tokenizer.id_to_bytes(i) else chr(tokenizer.id_to_bytes(i)[0]) for i in ids
    )


def parts(tokenizer, messages):
    """The texts of the parts of a conversation with and without weight, in turn, special ids by their names."""
    ids, runs, _ = make_format("auto", tokenizer).encode(messages)
    assert sum(count for count, _ in runs) == len(ids)
    found = {0.0: [], 1.0: []}
    for count, weight in runs:
        text = spelled(tokenizer, ids[:count])
        found[weight].append(text.encode("latin-1").decode("utf-8"))
        ids = ids[count:]
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistant_and_its_ends_alone_have_weight(name):
    tokenizer = Marked(TEMPLATES[name])
    end, before = ("</s>", " ") if name == "mistral" else ("<|eot|>", "")
    found = parts(tokenizer, TALK)
    assert found[1.0] == [f"{before}{message.text}{end}" for message in TALK[1::2]]
    assert all(
        "hi" in "".join(found[0.0]) and message.text not in "".join(found[0.0]) for message in TALK[1::2]
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer(name):
    tokenizer = Marked(TEMPLATES[name])
    form = make_format("template", tokenizer)
    assert isinstance(form, TemplateFormat) and tokenizer.piece(form.end) in ("<|eot|>", "</s>")
    ids, runs, _ = form.encode(TALK[:2])
    prompt = form.encode_prompt(TALK[:1])
    assert ids[: len(prompt)] == prompt and runs[0] == (len(prompt), 0.0)
    assert TALK[1].text in tokenizer.decode(ids[len(prompt) :])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_may_be_cut_where_a_message_follows_an_answer(name):
    form = make_format("auto", Marked(TEMPLATES[name]))
    ids, _, turns = form.encode(TALK)
    assert turns == [len(form.encode(TALK[:2]).ids)] and ids[: turns[0]] == form.encode(TALK[:2]).ids


@pytest.mark.interop
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(name):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name]
    )
    template = Template(TEMPLATES[name])
    for talk in (TALK, TALK[:3], [*TALK, Message("user", '"<&>"\t')], [SYSTEM, *TALK]):
        said = [{"role": m.role, "content": m.text} for m in talk]
        for answer in (False, True):
            tokens = {"bos_token": "<s>", "eos_token": "</s>"}
            if name == "gemma" and talk[0] == SYSTEM:
                with pytest.raises(TemplateError, match="refuses a conversation: System role not supported"):
                    template.render(said, answer=answer, tokens=tokens)
                continue
            expected = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=answer)
            assert template.render(said, answer=answer, tokens=tokens) == expected


@pytest.mark.interop
@pytest.mark.parametrize("spaces", ["prepend", "always", "first", "never", "bytes"])
def test_ids_are_those_of_transformers_however_a_tokenizer_puts_spaces(spaces, tmp_path):
    transformers, tokenizers = (pytest.importorskip(name) for name in ("transformers", "tokenizers"))
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    before = tokenizers.pre_tokenizers
    if spaces == "prepend":
        steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        library.normalizer = tokenizers.normalizers.Sequence(steps)
    elif spaces == "bytes":
        library.pre_tokenizer = before.ByteLevel(add_prefix_space=True)
    else:
        library.pre_tokenizer = before.Metaspace(prepend_scheme=spaces, split=False)
    marks = ["<unk>", "<s>", "</s>", "<|start|>", "<|eot|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=marks)
    library.train_from_iterator(["user hello there\nassistant how are you system bye now"] * 9, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["tagged"])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=TEMPLATES["tagged"], **special
    )
    form = make_format("auto", load_tokenizer(tmp_path))
    talk = [Message("user", "hello there"), Message("assistant", "how are"), Message("user", "bye")]
    said = [{"role": m.role, "content": m.text} for m in talk]
    for answer, ids in ((False, form.encode(talk).ids), (True, form.encode_prompt(talk))):
        expected = theirs.apply_chat_template(
            said, add_generation_prompt=answer, tokenize=True, return_dict=False
        )
        assert ids == expected


@pytest.mark.parametrize("source, message", [
    ("{% for", "is no program of Jinja"),
    ("{{ messages[7].content.nothing }}", "fails on a conversation"),
    ("{{ 1 / 0 }}", "fails on a conversation .ZeroDivisionError"),
    ("{{ messages | sum }}", "fails on a conversation .TypeError"),
    ("{{ raise_exception('not so') }}", "refuses a conversation: not so; change it"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on a conversation"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", f"more than {MOST_STEPS:,} tim"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "fails on a conversation"),
    ("{{ 'a' * 999999999 }}", "makes values of more than"),
    ("{{ 'a' * 15000000 + 'b' * 15000000 }}", "makes values of more than"),
    ("{{ 9 ** 999999999 }}", "makes values of more than"),
    ("{% set x = 'a' * 15000000 %}{{ x }}{{ x }}", "writes more than"),
    ("{{ messages.append(1) }}", "fails on a conversation"),
    ("{{ 'a' | center(2000000000) }}", "asks for a width of more than"),
    ("{{ 'a'.ljust(2000000000) }}", "asks for a width of more than"),
    ("{{ '%999999999d' | format(1) }}", "asks for a width of more than"),
    ("{{ '%999999999d' % 1 }}", "asks for a width of more than"),
    ("{{ lipsum(n=100000) }}", "fails on a conversation .UndefinedError"),
    ("{{ strftime_now('%d') }}", "fails on a conversation .UndefinedError: 'strftime_now' is undefined.; set the for"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "repeats itself"),
    ("{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
     "makes values of more than"),
])  # fmt: skip
def test_a_template_that_fails_or_loops_is_one_sentence(source, message):
    started = time.monotonic()
    with pytest.raises(TemplateError, match=message) as error:
        Template(source).render([{"role": "user", "content": "hi"}], answer=False, tokens={})
    assert "\n" not in str(error.value) and time.monotonic() - started < 60


@pytest.mark.parametrize("source, message", [
    ("{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}<|eot|>{% endfor %}",
     "writes message 2 otherwise when more follows"),
    ("{% for m in messages %}<|start|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}Think:{% endif %}",
     "asks for message 2 otherwise than it writes it"),
])  # fmt: skip
def test_a_template_that_changes_what_was_said_is_refused(source, message):
    with pytest.raises(
        TemplateError, match=f"{message}.*; set the format of conversations to chatml or plain"
    ):
        make_format("auto", Marked(source)).encode(TALK)


def test_a_token_that_goes_away_when_more_follows_is_no_part_of_the_conversation():
    source = (
        "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant:{% else %}{{ eos_token }}{% endif %}"
    )
    found = parts(Marked(source), TALK)
    assert found[1.0] == [f"{message.text}<|eot|>" for message in TALK[1::2]] and found[0.0][-1] == "</s>"


def test_a_format_needs_a_template_and_a_template_its_package(monkeypatch):
    with pytest.raises(
        UserError, match="conversation.format='template' needs a chat template .chat_template.jinja"
    ):
        make_format("template", ByteTokenizer(16))
    from llmjax.data.chat import template

    template._jinja.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UserError, match="needs the package jinja2; pip install llmjax"):
        make_format("auto", Marked(TEMPLATES["llama"]))
    template._jinja.cache_clear()
