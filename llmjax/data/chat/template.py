"""Chat templates of Hugging Face: programs in Jinja that write a conversation as text, as `transformers` runs them.

A template comes with a model and is a stranger's program. It runs in Jinja's sandbox, in which it reaches nothing but
the conversation, and with limits on what it repeats and how much it writes. There is no clock: templates that ask for
the date write the one that they have for this case, so that the same conversation is always the same text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.ranges import LONGEST

# The most steps of all loops and calls of a template, the most characters that it may write, and the largest number
# that it may give to a function, such as a width. Choices: conversations need far less.
MOST_STEPS, MOST_CHARACTERS, MOST_WIDTH = 1_000_000, 20_000_000, 10_000
# The filters that are put around what a loop goes through, and in the place of the operator ~.
COUNTED, JOINED = "counted_steps", "joined_texts"
# Jinja's own filters that fill texts up to a width.
WIDE = ("center", "format", "indent", "wordwrap")
WAY_OUT = "set the format of conversations to chatml or plain, or give another template"


class TemplateError(UserError):
    """A template that cannot be used, or that refuses a conversation."""


class Template:
    """A compiled chat template.

    Raises TemplateError for a program that is not one of Jinja, and UserError if the package jinja2 is missing.
    """

    def __init__(self, source: str):
        self._steps = 0
        self._template = self._compile(source)

    def _compile(self, source: str) -> Any:
        jinja2, environment = _jinja(), self._environment()
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(jinja2.nodes.For):
                loop.iter = jinja2.nodes.Filter(loop.iter, COUNTED, [], [], None, None)
            for joined in tree.find_all(jinja2.nodes.Concat):
                parts = jinja2.nodes.List(joined.nodes)
                joined.nodes = [jinja2.nodes.Filter(parts, JOINED, [], [], None, None)]
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template is no program of Jinja ({error}); {WAY_OUT}") from None
        return environment.template_class.from_code(environment, code, environment.make_globals(None))

    def _environment(self) -> Any:
        """The sandbox, with what templates expect of it, and with limits."""
        sandbox: Any = _jinja().sandbox.ImmutableSandboxedEnvironment
        template = self

        class Limited(sandbox):
            # Products of long texts, and texts that are filled up to a width, would fill the memory.
            intercepted_binops = frozenset(("*", "**", "+", "%"))

            def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
                _check_operands(operator, left, right)
                return super().call_binop(context, operator, left, right)

            def call(__self, __context: Any, __obj: Any, *values: Any, **named: Any) -> Any:
                # Macros may call themselves.
                template._step()
                if isinstance(getattr(__obj, "__self__", None), str):
                    _check_widths([*values, *named.values()])
                return super().call(__context, __obj, *values, **named)

        environment = Limited(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        environment.filters |= {name: _limited(environment.filters[name]) for name in WIDE}
        environment.filters |= {"tojson": _to_json, COUNTED: self._count, JOINED: _join}
        environment.globals["raise_exception"] = _refuse
        # It writes as much filler as one asks for.
        del environment.globals["lipsum"]
        return environment

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise TemplateError(f"the chat template repeats itself more than {MOST_STEPS:,} times; {WAY_OUT}")

    def _count(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def render(
        self, messages: Sequence[Mapping[str, str]], *, answer: bool, tokens: Mapping[str, str]
    ) -> str:
        """The text of a conversation.

        messages  mappings with `role` and `content`
        answer    whether the text ends with what comes before an answer of the assistant
        tokens    the texts of special tokens by the names that templates have for them, such as bos_token

        Raises TemplateError, in one sentence, if the template fails or refuses the conversation.
        """
        self._steps, length, parts = 0, 0, []
        copies = [dict(message) for message in messages]
        values = {"messages": copies, "tools": None, "documents": None, "add_generation_prompt": answer}
        try:
            for part in self._template.generate(**values, **tokens):
                length += len(part)
                if length > MOST_CHARACTERS:
                    raise TemplateError(
                        f"the chat template writes more than {MOST_CHARACTERS:,} characters; {WAY_OUT}"
                    )
                parts.append(part)
        except TemplateError:
            raise
        # A template does what any program does: it divides by 0, adds a text to a number, asks for a missing entry.
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise TemplateError(
                f"the chat template fails on a conversation ({_cut(why)}); {WAY_OUT}"
            ) from None
        return "".join(parts)


@functools.cache
def _jinja() -> Any:
    """The package jinja2, with its sandbox. UserError where it is not installed."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError(
            "the tokenizer has a chat template, which needs the package jinja2; pip install llmjax[convert], or set "
            "the format of conversations to chatml or plain"
        ) from None
    return jinja2


@functools.cache
def _generation_tag() -> type:
    """An extension for the tag {% generation %}, with which some templates mark answers. It changes nothing."""
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """TemplateError where an operator would make a text, a list or a number that is too long."""
    long = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
    numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
    size = max(long, default=1) * max(numbers, default=1) if operator == "*" else sum(long)
    if operator == "**" and len(numbers) == 2:
        size = numbers[1] * len(str(numbers[0]))
    if operator == "%" and isinstance(left, str):
        _check_widths([left])
    if size > MOST_CHARACTERS:
        raise TemplateError(
            f"the chat template makes values of more than {MOST_CHARACTERS:,} parts; {WAY_OUT}"
        )


def _limited(function: Any) -> Any:
    """`function`, which refuses numbers that are widths beyond all need."""

    @functools.wraps(function)
    def limited(*values: Any, **named: Any) -> Any:
        _check_widths([*values, *named.values()])
        return function(*values, **named)

    return limited


def _check_widths(values: Iterable[Any]) -> None:
    """TemplateError where one of the values is a very large number, or a text with one after a percent sign."""
    for value in values:
        widths = [value] if isinstance(value, int | float) else []
        if isinstance(value, str) and "%" in value:
            widths = [int(digits) for digits in re.findall(r"%[-+ #0]*\d*\.?(\d{5,18})", value)]
        if any(abs(width) > MOST_WIDTH for width in widths):
            raise TemplateError(f"the chat template asks for a width of more than {MOST_WIDTH:,}; {WAY_OUT}")


def _join(parts: Sequence[Any]) -> str:
    """The texts of the operator ~ as one."""
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise TemplateError(
            f"the chat template makes values of more than {MOST_CHARACTERS:,} parts; {WAY_OUT}"
        )
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it for templates, without the escapes for HTML of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: Any) -> None:
    raise TemplateError(
        f"the chat template refuses a conversation: {_cut(str(message))}; change it, or its format"
    )


def _cut(text: str) -> str:
    """The beginning of a text, as long as a sentence shows it."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
