"""`--mode=generate`: continues prompts, and the samples that a training run takes of itself."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program, make_program
from llmjax.build.restore import load_params, untrained_params
from llmjax.config.init_from import own_tokenizer, with_tokenizer
from llmjax.data.examples.contract import Prompt, Prompting
from llmjax.data.store.store import Store
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.data.tokenizer.vocabulary import vocabulary_of
from llmjax.errors import UserError, choose
from llmjax.escapes import show
from llmjax.generate.beam_search import Search, make_beam_search
from llmjax.generate.engine import Engine, Order, Sampling, write_all
from llmjax.generate.generate import (
    Generate,
    GenerateConfig,
    make_generator,
    power_of_two,
    round_up,
)
from llmjax.generate.text import StoppedText, until_stop
from llmjax.modes.parts.interactive import converse
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.terminal.lines import say, warn
from llmjax.terminal.stages import on_terminal, working
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params
from llmjax.workdir import standing

# Tokens of a held-out document that the samples of a run continue. A choice.
SAMPLE_PROMPT = 64


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used: `params` are those of `update`; `told` are the notes that were given."""

    program: Program
    params: Params
    tokenizer: Tokenizer
    update: int
    told: set[str] = dataclasses.field(default_factory=set)


def load(request: Request, speaks: Callable[[], bool] | None = None) -> Loaded:
    """The checkpoint that `request` names, with the tokenizer of its run.

    If the workdir holds no run yet, the parameters and the tokenizer are those of checkpoint.init_from.
    """
    config, workdir = request.config, request.workdir
    untrained = bool(config.checkpoint.init_from) and not standing.has_begun(workdir)
    if untrained and request.checkpoint != "latest":
        raise UserError(
            f"--checkpoint={request.checkpoint} is of a run, and --workdir={workdir} holds none; name the checkpoint "
            "of checkpoint.init_from by --config.checkpoint.init_checkpoint"
        )
    if untrained:
        tokenizer = load_tokenizer(with_tokenizer(config, workdir).tokenizer.path)
    else:
        tokenizer = own_tokenizer(workdir)
    program = make_program(
        config, request.derived, tokenizer.vocab_size, vocabulary=lambda: vocabulary_of(tokenizer)
    )
    with working("reading the checkpoint", speaks):
        if untrained:
            update, params = untrained_params(program)
        else:
            update, params = load_params(program, workdir, request.checkpoint)
    return Loaded(program, params, tokenizer, update)


def run(request: Request) -> int:
    """Continues the prompts. A single text is streamed; several are shown one after the other when all are done."""
    if request.interactive:
        return run_interactive(request)
    prompts, config = list(request.prompts) or [""], request.config.generate
    streams = len(prompts) * config.num_samples * config.num_beams == 1 and hosts.is_primary()
    # Where there are several texts, others may read the output: then it has nothing else.
    speaks = None if streams else on_terminal
    loaded = load(request, speaks)
    check_continues(loaded.program)
    writer = Writer(loaded, speaks=speaks)
    if streams:
        # The prompt comes with the first token: until then its line tells what goes on.
        pieces = iter(prompts)
        writer.write(prompts, lambda row, text: show(next(pieces, "") + text, end=""))
        show(next(pieces, ""))
        return 0
    texts = writer.write(prompts)
    for number, (prompt, samples) in enumerate(zip(prompts, texts), 1):
        say(describe_samples(number, prompt, samples))
    return 0


def describe_samples(number: int, prompt: str, samples: Sequence[str]) -> str:
    """The texts after a prompt, each below a line that says whose it is."""
    which = [
        f", sample {i} of {len(samples)}" if len(samples) > 1 else "" for i in range(1, len(samples) + 1)
    ]
    return "\n".join(f"--- {number}{of}\n{prompt}{text}" for of, text in zip(which, samples))


def run_interactive(request: Request) -> int:
    """Continues each line that is typed, or that comes through a pipe. A single text for a line is streamed."""
    if jax.process_count() > 1:
        raise UserError(
            "--interactive=true reads the lines of one terminal, and there are several processes; use --prompt_file"
        )
    loaded, config = load(request), request.config.generate
    check_continues(loaded.program)
    writer, streams = Writer(loaded, power_of_two), config.num_samples * config.num_beams == 1
    typed = sys.stdin.isatty() and sys.stdout.isatty()

    def write(number: int, line: str, watch: Watch) -> None:
        if not streams:
            (samples,) = writer.write([line], watch=watch, first=number)
            show(describe_samples(number + 1, line, samples))
            return
        pieces = iter([line if typed else f"--- {number + 1}\n{line}"])
        writer.write([line], lambda row, text: show(next(pieces, "") + text, end=""), watch, number)
        show("")

    converse(write)
    return 0


# What the tasks of each `Task.use` do instead of continuing a text, and the mode for it.
OTHER_USES = {
    "fill_masks": ("fills in masks and continues no text", "--mode=evaluate"),
    "fill_spans": ("fills gaps of a text and continues none", "--mode=evaluate"),
    "classify": ("gives labels to texts and continues none", "--mode=classify"),
    "chat": ("learns what an assistant says", "--mode=chat"),
    "translate": ("writes a text after it has read another, and continues none", "--mode=translate"),
}


def mode_for(program: Program) -> str:
    """The mode that uses a model of this program, as an advice."""
    use = program.task.use
    return "--mode=generate" if use == "generate" else choose(OTHER_USES, "task.use", use)[1]


def check_continues(program: Program) -> None:
    """UserError where the model continues no text, and where its task reads a second stream of tokens, which a text by
    itself does not bring."""
    name, use = program.config.task.name, program.task.use
    if use != "generate":
        does, mode = choose(OTHER_USES, "task.use", use)
        raise UserError(
            f"task.name={name!r} {does}; use {mode}, or train a model with task.name=language_model"
        )
    if "source" in program.derived.examples.columns:
        raise UserError(f"task.name={name!r} reads two texts, and a prompt is one; use --mode=evaluate")


class Writer:
    """Writes after prompts with a loaded checkpoint. Lengths that were seen before compile nothing.

    A task that is `Prompting` writes another text than the prompt, and all others go on with it.
    """

    def __init__(
        self,
        loaded: Loaded,
        width_of: Callable[[int], int] = round_up,
        speaks: Callable[[], bool] | None = None,
    ):
        self._loaded, self._speaks = loaded, speaks
        self._config = loaded.program.config.generate
        self._examples = loaded.program.derived.examples
        if self._config.slots:
            alone = jax.process_count() == 1
            if not alone or "source" in self._examples.columns:
                raise UserError(
                    f"generate.slots={self._config.slots} writes side by side, and "
                    f"{'each text reads another one' if alone else 'there are several processes'}; leave it at 0"
                )
        make = searcher if self._config.num_beams > 1 else generator
        self._generate: Any = make(loaded.program, loaded.tokenizer, self._config, width_of)

    def write(
        self,
        prompts: Sequence[str],
        on_text: Callable[[int, str], None] = lambda row, text: None,
        watch: Watch = iter,
        first: int = 0,
    ) -> list[list[str]]:
        """What the model writes after each of the prompts: generate.num_samples texts for each.

        on_text  called with the row of a text, counted over all samples of all prompts, and each piece as it comes
        watch    sees each token go by, and may end all texts early
        first    the number of the first prompt, on which the samples depend
        """
        loaded, num_samples, examples = self._loaded, self._config.num_samples, self._examples
        tokenizer, writes_anew = loaded.tokenizer, isinstance(examples, Prompting)
        read = [
            examples.encode_prompt(prompt, tokenizer)
            if isinstance(examples, Prompting)
            else Prompt([tokenizer.bos_id, *tokenizer.encode(prompt)])
            for prompt in prompts
        ]
        ids, sources = [prompt.tokens for prompt in read], sources_of(read)
        program = loaded.program
        self._remark(ids, "data.seq_len", program.config.data.seq_len)
        if sources is not None:
            self._remark(sources, "data.source_len", program.derived.source_len)
        if self._config.num_beams > 1:
            with working("searching", self._speaks):
                found = self._generate(loaded.params, ids, sources, watch)
            return [
                [tokenizer.decode(text, continues=not writes_anew and bool(prompt)) for text in texts]
                for prompt, texts in zip(prompts, found, strict=True)
            ]
        decoders = [
            StoppedText(tokenizer, self._config.stop, continues=not writes_anew and bool(prompt))
            for prompt in prompts
            for _ in range(num_samples)
        ]
        texts = [""] * len(decoders)

        def add(row: int, text: str) -> None:
            texts[row] += text
            on_text(row, text)

        def has_ended(row: int) -> bool:
            return decoders[row].stopped

        if 0 < self._config.slots < len(decoders):
            pairs = self._side_by_side(ids, first, has_ended)
        else:
            pairs = _all_at_once(self._generate(loaded.params, ids, first, sources), len(decoders), has_ended)
        tokens = iter(watch(pairs))
        with working("reading the prompt", self._speaks):
            first_tokens = list(itertools.islice(tokens, 1))
        for row, token in itertools.chain(first_tokens, tokens):
            add(row, decoders[row].push(token))
        for row, decoder in enumerate(decoders):
            add(row, decoder.flush())
        return [texts[row : row + num_samples] for row in range(0, len(texts), num_samples)]

    def _side_by_side(
        self, prompts: Sequence[Sequence[int]], first: int, has_ended: Callable[[int], bool]
    ) -> Iterator[tuple[int, int]]:
        """Yields (row, id), as `_all_at_once` does, of texts of which generate.slots are written at the same time."""
        config, loaded, tokenizer = self._config, self._loaded, self._loaded.tokenizer
        settings = {field.name: getattr(config, field.name, 0) for field in dataclasses.fields(Sampling)}
        orders = [
            Order(
                tuple(prompt),
                config.max_tokens,
                Sampling(**settings | {"index": first + index, "number": number}),
                ends=(tokenizer.eos_id,),
            )
            for index, prompt in enumerate(prompts)
            for number in range(config.num_samples)
        ]
        context = max(map(len, prompts)) + config.max_tokens
        engine = Engine(
            loaded.program.model, loaded.params, config.slots, context, banned_ids=no_text(tokenizer)
        )
        yield from write_all(engine, orders, has_ended)

    def _remark(self, prompts: Sequence[Sequence[int]], key: str, trained: int) -> None:
        """Says what a user should know of the texts, once for each thing.

        trained  the tokens of a row in training, which `key` names
        """
        config, longest, notes = self._config, max(map(len, prompts), default=0), {}
        if config.num_samples > 1 and config.is_greedy:
            setting = "temperature=0" if config.temperature == 0 else "top_k=1"
            notes["alike"] = (
                f"generate.{setting} always takes the likeliest token, so that the generate.num_samples="
                f"{config.num_samples} texts of a prompt are alike; use a higher value"
            )
        if longest > trained:
            notes["long"] = (
                f"the longest prompt has {longest:,} tokens, and the model was trained on {key}={trained:,}; "
                "expect worse text from there on, or shorten the prompt"
            )
        for kind, note in notes.items():
            if kind not in self._loaded.told:
                self._loaded.told.add(kind)
                warn(f"note: {note}")


def _all_at_once(
    tokens: Iterable[Sequence[int | None]], rows: int, has_ended: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    """Yields (row, id) of texts whose next tokens come together, until all have ended."""
    for new in tokens:
        for row, token in enumerate(new):
            if token is not None and not has_ended(row):
                yield row, token
        if all(map(has_ended, range(rows))):
            return


def sources_of(prompts: Sequence[Prompt]) -> list[Sequence[int]] | None:
    """The second stream of each prompt; None where they have none."""
    return [prompt.source for prompt in prompts] if any(prompt.source for prompt in prompts) else None


def given_part(store: Store, document: int) -> list[int]:
    """The tokens at the beginning of a document that have no weight: those that were given, and not learned."""
    length = int(store.lengths[document])
    weights = store.weights(document, 0, length).tolist()
    given = len(list(itertools.takewhile(lambda weight: weight == 0, weights)))
    ids: list[int] = store.tokens(document, 0, given).tolist()
    return ids


def make_sampler(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(prompt, continuation)], which is compiled once for a whole run.

    The prompt is the beginning of the longest held-out document, or nothing where none is held out. `watch` sees each
    token go by.
    """
    tokenizer, store, prompt = corpus.tokenizer, corpus.store, [corpus.tokenizer.bos_id]
    if len(corpus.held_out_ids):
        doc = int(corpus.held_out_ids[np.argmax(store.lengths[corpus.held_out_ids])])
        length = min(SAMPLE_PROMPT, int(store.lengths[doc]) // 2, program.config.data.seq_len // 2)
        prompt = store.tokens(doc, 0, max(length, 1)).tolist()
    one = dataclasses.replace(program.config.generate, num_samples=1)
    write = generator(program, tokenizer, one)

    def sample(params: Params, watch: Watch) -> list[tuple[str, str]]:
        new = [ids[0] for ids in watch(write(params, [prompt])) if ids[0] is not None]
        text = until_stop(tokenizer.decode(new, continues=len(prompt) > 1), one.stop)
        return [(tokenizer.decode(prompt[1:]), text)]

    return sample


def generator(
    program: Program,
    tokenizer: Tokenizer,
    config: GenerateConfig,
    width_of: Callable[[int], int] = round_up,
) -> Generate:
    """Sampling with the settings in `config`; ids that stand for no text, other than the end, are never drawn."""
    return make_generator(
        program.model, config, eos_id=tokenizer.eos_id, banned_ids=no_text(tokenizer), width_of=width_of
    )


def searcher(
    program: Program,
    tokenizer: Tokenizer,
    config: GenerateConfig,
    width_of: Callable[[int], int] = round_up,
) -> Search:
    """Beam search with the settings in `config`, in which ids that stand for no text never appear."""
    return make_beam_search(
        program.model, config, eos_id=tokenizer.eos_id, banned_ids=no_text(tokenizer), width_of=width_of
    )


def no_text(tokenizer: Tokenizer) -> list[int]:
    """The ids that stand for no text, other than the end."""
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id, *tokenizer.reserved_ids}
    return sorted(special - {tokenizer.eos_id})
