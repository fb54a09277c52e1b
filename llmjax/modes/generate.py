"""`--mode=generate`: continues prompts, and the samples that a training run takes of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program, make_program
from llmjax.build.restore import (
    load_params,
)
from llmjax.config.init_from import own_tokenizer
from llmjax.data.tokenizer.tokenizer import StreamDecoder, Tokenizer
from llmjax.errors import UserError
from llmjax.escapes import show
from llmjax.generate.generate import make_generator
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.terminal.lines import say
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params

SAMPLE_PROMPT = 64  # tokens of a held-out document that the samples of a run continue


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to be used: `params` are those of `update`."""

    program: Program
    params: Params
    tokenizer: Tokenizer
    update: int


def load(request: Request) -> Loaded:
    """The checkpoint that `request` names, with the tokenizer of its run."""
    tokenizer = own_tokenizer(request.workdir)
    program = make_program(request.config, request.derived, tokenizer.vocab_size)
    update, params = load_params(program, request.workdir, request.checkpoint)
    return Loaded(program, params, tokenizer, update)


def run(request: Request) -> int:
    """Continues the prompts: one is streamed, several are shown one after the other when all are done."""
    prompts = list(request.prompts) or [""]
    streams = len(prompts) == 1 and hosts.is_primary()
    loaded = load(request)
    if streams:
        show(prompts[0], end="")
    texts = continue_texts(loaded, prompts, on_text=lambda row, text: show(text, end="") if streams else None)
    if streams:
        show("")
    else:
        for number, (prompt, text) in enumerate(zip(prompts, texts), 1):
            say(f"--- {number}\n{prompt}{text}")
    return 0


def check_one_stream(program: Program) -> None:
    """UserError where the task reads a second stream of tokens, which a text by itself does not bring."""
    name = program.config.task.name
    if "source" in program.derived.examples.columns:
        raise UserError(f"task.name={name!r} reads two texts, and a prompt is one; use --mode=evaluate")


def continue_texts(
    loaded: Loaded, prompts: Sequence[str], on_text: Callable[[int, str], None] = lambda row, text: None
) -> list[str]:
    """What the model writes after each of the prompts; `on_text(row, text)` is told of each piece as it comes."""
    check_one_stream(loaded.program)
    tokenizer = loaded.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    decoders = [StreamDecoder(tokenizer, continues=bool(prompt)) for prompt in prompts]
    texts = [""] * len(prompts)

    def add(row: int, text: str) -> None:
        texts[row] += text
        on_text(row, text)

    for new in generator(loaded.program, tokenizer)(loaded.params, ids):
        for row, token in enumerate(new):
            if token is not None:
                add(row, decoders[row].push(token))
    for row, decoder in enumerate(decoders):
        add(row, decoder.flush())
    return texts


def sample_texts(
    program: Program, corpus: Corpus, params: Params, watch: Watch = iter
) -> list[tuple[str, str]]:
    """(prompt, continuation) of the longest held-out document's beginning, or of nothing where none is held out.

    `watch` sees each token go by.
    """
    tokenizer, store, prompt = corpus.tokenizer, corpus.store, [corpus.tokenizer.bos_id]
    if len(corpus.held_out_ids):
        doc = int(corpus.held_out_ids[np.argmax(store.lengths[corpus.held_out_ids])])
        length = min(SAMPLE_PROMPT, int(store.lengths[doc]) // 2, program.config.data.seq_len // 2)
        prompt = store.tokens(doc, 0, max(length, 1)).tolist()
    new = [ids[0] for ids in watch(generator(program, tokenizer)(params, [prompt])) if ids[0] is not None]
    return [(tokenizer.decode(prompt[1:]), tokenizer.decode(new, continues=len(prompt) > 1))]


def generator(
    program: Program, tokenizer: Tokenizer
) -> Callable[[Params, Sequence[Sequence[int]]], Iterator[list]]:
    """Sampling with the config's settings; ids that stand for no text, other than the end, are never drawn."""
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id, *tokenizer.reserved_ids}
    return make_generator(
        program.model,
        program.config.generate,
        eos_id=tokenizer.eos_id,
        banned_ids=sorted(special - {tokenizer.eos_id}),
    )
