"""The samples that a training run takes of itself: one way for each use of a task (`Task.use`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.modes.chat import make_answer
from llmjax.modes.classify import make_labeller
from llmjax.modes.generate import make_sampler
from llmjax.modes.samples.fill_masks import make_filler
from llmjax.modes.samples.fill_spans import make_span_filler
from llmjax.modes.translate import make_translation
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params

# (params, watch) -> [(what the model was given, what it wrote)]. The watch sees each token go by.
Sample = Callable[[Params, Watch], list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Samples:
    """How samples are taken and told of.

    make     a function of (program, corpus) that returns the `Sample`
    before   the word before what the model was given
    did      what the model did with it
    mode     the mode that uses the model; "" for none
    opening  the most characters of a sample that the command shown at the end has as its prompt. A choice: half of a
             text may have another label
    """

    make: Callable[[Program, Corpus], Sample]
    before: str
    did: str
    mode: str
    opening: int = 20


SAMPLES = {
    "generate": Samples(make_sampler, "after", "the model continued", "generate"),
    "fill_masks": Samples(make_filler, "of", "the model made", ""),
    "fill_spans": Samples(make_span_filler, "of", "the model made", ""),
    "chat": Samples(make_answer, "of", "the model answered", "chat"),
    "classify": Samples(make_labeller, "for", "the model gave", "classify", opening=60),
    "translate": Samples(make_translation, "of", "the model made", "translate", opening=60),
}
