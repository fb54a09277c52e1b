"""Chat templates of Hugging Face: programs in Jinja that write a conversation as text, as `transformers` runs them.

A template comes with a model and is a stranger's program. It runs in Jinja's sandbox, in which it reaches nothing but
the conversation, and with limits on what it repeats and how much it writes. There is no clock: templates that ask for
the date write the one that they have for this case, so that the same conversation is always the same text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmjax.errors import UserError
from llmjax.ranges import shown

# The most steps of all loops of a template, and the most characters that it may write. Choices: conversations need far
# fewer.
MOST_STEPS, MOST_CHARACTERS = 1_000_000, 50_000_000
# The filter that counts the steps of a loop.
COUNTED = "counted_steps"


class TemplateError(UserError):
    """A template that cannot be used, or that refuses a conversation."""


class Template:
    """A compiled chat template. It can be called from several threads, one after the other.

    Raises TemplateError for a program that is not one of Jinja, and UserError if the package jinja2 is missing.
    """

    def __init__(self, source: str):
        self._steps = 0
        self._template = self._compile(source)

    def _compile(self, source: str) -> Any:
        jinja2, sandbox = _jinja()
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        # Products of long texts would fill the memory.
        environment.intercepted_binops = frozenset(("*", "**", "+", "~"))
        environment.call_binop = _limited_operator(environment.call_binop)
        environment.filters["tojson"] = _to_json
        environment.filters[COUNTED] = self._count
        environment.globals["raise_exception"] = _refuse
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(jinja2.nodes.For):
                loop.iter = jinja2.nodes.Filter(loop.iter, COUNTED, [], [], None, None)
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template is no program of Jinja ({error}); give another") from None
        return environment.template_class.from_code(environment, code, environment.make_globals(None))

    def _count(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise TemplateError(
                    f"the chat template repeats itself more than {MOST_STEPS:,} times; give another"
                )
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
        jinja2, _ = _jinja()
        self._steps, length, parts = 0, 0, []
        copies = [dict(message) for message in messages]
        values = {"messages": copies, "tools": None, "documents": None, "add_generation_prompt": answer}
        try:
            for part in self._template.generate(**values, **tokens):
                length += len(part)
                if length > MOST_CHARACTERS:
                    raise TemplateError(
                        f"the chat template writes more than {MOST_CHARACTERS:,} characters; give another"
                    )
                parts.append(part)
        except TemplateError:
            raise
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise TemplateError(
                f"the chat template fails on a conversation ({_reason(error)}); give another"
            ) from None
        # A template does what any program does: it divides by 0, adds a text to a number, asks for a missing entry.
        except Exception as error:
            raise TemplateError(
                f"the chat template fails on a conversation ({type(error).__name__}: {_reason(error)}); give another"
            ) from None
        return "".join(parts)


@functools.cache
def _jinja() -> tuple[Any, Any]:
    """The package jinja2 and its sandbox. UserError where it is not installed."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError(
            "the tokenizer has a chat template, which needs the package jinja2; pip install llmjax[convert], or set "
            "the format of conversations to chatml or plain"
        ) from None
    return jinja2, jinja2.sandbox


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


def _limited_operator(call: Any) -> Any:
    """The operators of the sandbox, which refuse to make texts, lists and numbers that are too long."""

    def limited(context: Any, operator: str, left: Any, right: Any) -> Any:
        long = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        numbers = [abs(x) for x in (left, right) if isinstance(x, int | float)]
        size = max(long, default=1) * max(numbers, default=1) if operator == "*" else sum(long)
        if operator == "**" and len(numbers) == 2:
            size = numbers[1] * len(str(numbers[0]))
        if size > MOST_CHARACTERS:
            raise TemplateError(
                f"the chat template makes values of more than {MOST_CHARACTERS:,} parts; give another"
            )
        return call(context, operator, left, right)

    return limited


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
        f"the chat template refuses a conversation: {_reason(message)}; change it, or its format"
    )


def _reason(error: Any) -> str:
    return shown(str(error)).strip("'\"")
