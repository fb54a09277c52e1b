"""`--mode=plan`: prints what a config amounts to, and compiles its training step to find out whether it fits.

It does so for the devices of this machine, or for those that plan.topology names, which need not be there.
"""

from __future__ import annotations

from llmjax.build.corpus import make_corpus
from llmjax.build.corpus_record import (
    describe_difference,
    trained_on,
)
from llmjax.build.program import make_program
from llmjax.build.tuning.adapters import check_tuning
from llmjax.build.tuning.frozen import describe_lost
from llmjax.config.init_from import resumes, with_tokenizer
from llmjax.data.tokenizer.kinds import KINDS, TokenizerConfig
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.vocabulary import words_without_text
from llmjax.modes.parts.learned import show_learned
from llmjax.modes.request import Request
from llmjax.plan.advice import remarks
from llmjax.plan.compile import compile_step
from llmjax.plan.summary import describe, describe_program
from llmjax.terminal.lines import format_table, say
from llmjax.terminal.stages import StageProgress, working
from llmjax.workdir import standing


def run(request: Request) -> int:
    """Prints sizes, costs and advice, compiles the step and prints its memory. Returns the exit code 0.

    With plan.topology the corpus is not read. Rows are then assumed to be filled by one document each.
    """
    config, derived, workdir = request.config, request.derived, request.workdir
    check_tuning(config, derived, request.devices, workdir)
    if config.plan.topology:
        size = planned_vocab_size(config.tokenizer)
        program = make_program(
            config, derived, size, request.devices, vocabulary=lambda: words_without_text(size)
        )
        # In a document as long as the row, a token attends to half of the row on average.
        rows = describe_program(program, attended=(config.data.seq_len + 1) / 2)
    else:
        with StageProgress() as progress:
            corpus = make_corpus(with_tokenizer(config, workdir), derived, progress)
        under_way = standing.has_begun(workdir) and resumes(config, workdir)
        if under_way and (different := describe_difference(workdir, trained_on(workdir), corpus)):
            say(f"{different}; training does not go on with these\n")
        program = make_program(config, derived, corpus.tokenizer.vocab_size, vocabulary=corpus.vocabulary)
        if under_way and (lost := describe_lost(program, workdir)):
            say(f"{lost}\n")
        rows = describe(corpus, program, workdir)
    say(f"plan\n{format_table(rows)}")
    if not config.plan.topology:
        show_learned(program, corpus)
    for remark in remarks(program):
        say(f"note: {remark}")
    with working("compiling the step"):
        compiled = compile_step(program, say)
    say(format_table(compiled))
    return 0


def planned_vocab_size(config: TokenizerConfig) -> int:
    """The number of ids that the tokenizer will have, found out without the corpus that it may be trained on.

    Raises `DamagedError` if tokenizer.path names a file that cannot be read.
    """
    if config.path:
        return load_tokenizer(config.path).vocab_size
    fixed = KINDS[config.kind].fixed
    return config.vocab_size if fixed is None else fixed(config.num_reserved).vocab_size
