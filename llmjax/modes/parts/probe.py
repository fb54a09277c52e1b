"""Runs the probes of long context that a config asks for, and writes their results to probes.json."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.config.schema import Config
from llmjax.evaluate.probes import suite
from llmjax.evaluate.scoring import Arrays, Probe, Text
from llmjax.parallel import hosts
from llmjax.terminal.lines import format_table, say
from llmjax.terminal.stages import working
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Params
from llmjax.workdir.contents import write_json


def make_probes(corpus: Corpus, config: Config) -> dict[str, Probe]:
    """The probes that the config asks for, by name. There are none without a held-out part of the corpus."""
    if corpus.held_out is None:
        return {}
    text = Text(corpus.held_out, corpus.held_out_ids, corpus.tokenizer)
    return suite.make_probes(config.evaluate.probes, config.evaluate.probe_lengths, text)


def probe(
    program: Program,
    asked: Mapping[str, Probe],
    params: Params,
    update: int,
    workdir: pathlib.Path,
    watch: Watch = iter,
) -> None:
    """Runs the probes, prints their results and writes them to probes.json in the workdir.

    Args:
      program: the model and its placement on devices.
      asked: the probes, as `make_probes` returns them. If there are none, nothing happens.
      params: the parameters to probe.
      update: the number of the update after which the run had these parameters.
      workdir: the folder for probes.json.
      watch: passes on the batches of texts that it is given, and may stop in between.
    """
    if not asked:
        return
    say(f"\nprobing {', '.join(asked)}")

    def losses(params: Params, arrays: Arrays) -> tuple[Any, Any]:
        """The loss of each token of a batch of texts."""
        (arrays,) = watch([arrays])
        return program.token_losses(params, program.placement.place(arrays))

    with working("probing"):
        results = suite.run_probes(asked, losses, params, program.probe_shape)
    if hosts.is_primary():
        write_json(workdir / "probes.json", {"update": update, **results})
    say(format_table(suite.describe(results)))
