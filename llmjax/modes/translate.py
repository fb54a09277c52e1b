"""`--mode=translate`: writes the translation of each text, a line for a line.

The texts are those of --prompt, the lines of --prompt_file, or with --interactive each line that is typed. With
--references, which has the right translations in the same order, BLEU and chrF follow on standard error.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.data.examples.contract import Prompt
from llmjax.errors import UserError
from llmjax.escapes import show
from llmjax.generate.generate import power_of_two
from llmjax.generate.text import until_stop
from llmjax.modes.generate import Writer, generator, given_part, load, mode_for, sources_of
from llmjax.modes.parts.interactive import converse
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.terminal.lines import warn
from llmjax.terminal.stages import on_terminal
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params

# How many texts are translated at a time. A choice: more of them need more memory.
AT_ONCE = 32
# Chinese and Japanese characters. The tokenizer of BLEU is zh where a reference has one.
IDEOGRAPHS = re.compile("[\u3040-\u30ff\u3400-\u9fff]")


def run(request: Request) -> int:
    """Translates all texts and returns exit code 0."""
    if request.config.generate.num_samples > 1:
        raise UserError(
            f"generate.num_samples={request.config.generate.num_samples} is without effect for --mode=translate, which "
            "writes one text for each; leave it at 1"
        )
    if request.interactive:
        if request.references:
            raise UserError("--references is for texts of a file, not for --interactive; leave one out")
        return run_interactive(request)
    if not request.prompts:
        raise UserError(
            "--mode=translate has nothing to translate; give --prompt=TEXT, --prompt_file=FILE (- for standard input) "
            "or --interactive"
        )
    references = read_references(request.references, len(request.prompts)) if request.references else []
    loaded = load(request, on_terminal)
    check_translates(loaded.program)
    writer = Writer(loaded, power_of_two, on_terminal)
    made: list[str] = []
    for texts in _batches(request.prompts):
        made += translate(writer, texts, first=len(made))
        if hosts.is_primary():
            for text in made[-len(texts) :]:
                show(text)
    if references and hosts.is_primary():
        for line in describe_scores(made, references):
            warn(line)
    return 0


def run_interactive(request: Request) -> int:
    """Translates each line that is typed, or that comes through a pipe."""
    if jax.process_count() > 1:
        raise UserError(
            "--interactive=true reads the lines of one terminal, and there are several processes; use --prompt_file"
        )
    loaded = load(request, on_terminal)
    check_translates(loaded.program)
    writer = Writer(loaded, power_of_two, on_terminal)

    def write(number: int, line: str, watch: Watch) -> None:
        show(translate(writer, [line], watch, number)[0])

    converse(write)
    return 0


def check_translates(program: Program) -> None:
    """UserError where the model was not trained to write a text after another."""
    if program.task.use != "translate":
        raise UserError(
            f"task.name={program.config.task.name!r} does not translate; use {mode_for(program)}, or train a model "
            "with task.name=translation"
        )


def translate(writer: Writer, texts: Sequence[str], watch: Watch = iter, first: int = 0) -> list[str]:
    """The translation of each text, in one line. A text without any character but spaces has none."""
    given = [text for text in texts if text.strip()]
    made = iter(writer.write(given, watch=watch, first=first)) if given else iter(())
    return [" ".join(next(made)[0].split()) if text.strip() else "" for text in texts]


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE)]


def read_references(path: pathlib.Path, number: int) -> list[str]:
    """The lines of a file with `number` translations."""
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--references={path} cannot be read ({error}); give a text file in UTF-8 with a translation a line"
        ) from None
    # Lines end as those of --prompt_file do.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    if len(lines) != number:
        raise UserError(
            f"--references={path} has {len(lines):,} lines for {number:,} texts; give one line for each"
        )
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise UserError(
            "--references needs sacrebleu, which is not installed; run pip install 'llmjax[translate]'"
        ) from None
    return lines


def describe_scores(made: Sequence[str], references: Sequence[str]) -> list[str]:
    """BLEU and chrF of the translations, with the signatures of sacrebleu, by which others can repeat them."""
    import sacrebleu

    chinese = any(map(IDEOGRAPHS.search, references))
    metrics = sacrebleu.BLEU(tokenize="zh" if chinese else "13a"), sacrebleu.CHRF()
    scores = [
        (metric.corpus_score(list(made), [list(references)]), metric.get_signature()) for metric in metrics
    ]
    return [f"{score}  {signature}" for score, signature in scores]


def make_translation(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(source, translation)], which is compiled once for a whole run.

    The source is that of the longest held-out document, or of the first document where none is held out.
    """
    tokenizer, store, ids = corpus.tokenizer, corpus.store, corpus.held_out_ids
    doc = int(ids[np.argmax(store.lengths[ids])]) if len(ids) else 0
    if "source" in program.derived.examples.columns:
        prompt = Prompt([tokenizer.bos_id], source=store.source(doc).tolist())
        text = tokenizer.decode(prompt.source[:-1])
    else:
        # A token at each end marks the source.
        prompt = Prompt(given_part(store, doc))
        text = tokenizer.decode(prompt.tokens[1:-1])
    greedy = dataclasses.replace(
        program.config.generate, num_samples=1, num_beams=1, length_penalty=1.0, temperature=0.0
    )
    write = generator(program, tokenizer, greedy)

    def sample(params: Params, watch: Watch) -> list[tuple[str, str]]:
        tokens = watch(write(params, [prompt.tokens], 0, sources_of([prompt])))
        written = tokenizer.decode([new[0] for new in tokens if new[0] is not None])
        return [(text, until_stop(written, greedy.stop))]

    return sample
