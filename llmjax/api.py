"""llmjax from Python and notebooks: train a run, or load one and use it.

    import llmjax

    run = llmjax.train("configs/base.py", {"train.num_updates": 40}, workdir="runs/mine")
    run.evaluate()                    # {"loss": ..., "bits_per_byte": ...} on the held-out text
    run.generate("import ")           # what the model writes after the prompt
    run.score("a text of your own")   # how well the model predicts it
    run.generate("import ", num_samples=3)                     # a list of three texts
    llmjax.load("runs/spam").classify("a text").label          # for a run with task.name=classification
    run.embed(["a text", "another"], pool="mean")              # their vectors, [2, model_dim]
    run.neighbours("word")                                     # the tokens nearest to it
    llmjax.load("runs/mine", checkpoint="best").generate("import ", temperature=0.0)

The command line runs the same modes. Mistakes raise `llmjax.errors.UserError` with one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, overload

import numpy as np

from llmjax.build.compiled_programs import reuse_programs
from llmjax.build.corpus import cache_directory
from llmjax.build.corpus_record import describe_difference, trained_on
from llmjax.config.file import load_config_file, plain_dict
from llmjax.config.reading import complete_config
from llmjax.errors import UserError
from llmjax.evaluate.scoring import Piece, score_pieces
from llmjax.flags import load_config, name_of, set_key, takes_list
from llmjax.modes import dispatch
from llmjax.modes.classify import Answer, TextClassifier
from llmjax.modes.embed import TextEmbedder
from llmjax.modes.evaluate import score_held_out
from llmjax.modes.generate import Loaded, Writer, check_continues
from llmjax.modes.generate import load as load_checkpoint
from llmjax.modes.parts.corpus import read_corpus
from llmjax.modes.translate import check_translates, translate
from llmjax.terminal.lines import say
from llmjax.workdir.contents import check_place
from llmjax.workdir.metrics import Metrics, read_metrics

PathLike = str | os.PathLike


def train(
    config: PathLike | Mapping[str, Any] = "base",
    changes: Mapping[str, Any] | None = None,
    *,
    workdir: PathLike | None = None,
) -> Run:
    """Trains, or goes on with the training in `workdir`, and returns the run.

    Args:
      config: a config file, the name of one that comes with llmjax, or what its `get_config()` returns.
      changes: values of keys, such as {"train.num_updates": 40}.
      workdir: where everything of the run is written; default: runs/NAME for the config NAME.

    Raises:
      UserError: for a mistake in what is asked for.
      RuntimeError: where training failed; what it has said on stderr says how.
    """
    if isinstance(config, str | os.PathLike):
        raw = load_config_file(os.fspath(config))
        place = _path("workdir", workdir or f"runs/{name_of(os.fspath(config))}")
    else:
        raw = plain_dict(config)
        if workdir is None:
            raise UserError(
                "workdir is not given, and a config without a file has no name for one; give workdir"
            )
        place = _path("workdir", workdir)
    check_place(place)
    code = dispatch.run("train", _changed(raw, changes), place, prompts=(), checkpoint="latest")
    if code == 1:
        raise RuntimeError(f"training in {place} failed; what was trained is saved there")
    return Run(place)


def load(workdir: PathLike, checkpoint: str | int = "latest") -> Run:
    """The run in `workdir`; `checkpoint` is latest, best or the number of an update. Its parameters are read later."""
    place = _path("workdir", workdir)
    load_config(None, str(place))
    return Run(place, str(checkpoint))


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run. Its checkpoint is read when it is first used.

    workdir     where everything of the run lies
    checkpoint  latest, best or the number of an update
    """

    workdir: pathlib.Path
    checkpoint: str = "latest"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, section by section, with every key of today also where an older version wrote it."""
        return complete_config(load_config(None, str(self.workdir)), self.workdir)

    @property
    def metrics(self) -> Metrics:
        """The lines of metrics.jsonl by kind: `.train`, `.evaluate`, `.statistics`, `.events`."""
        return read_metrics(self.workdir / "metrics.jsonl")

    @property
    def report(self) -> pathlib.Path:
        """The page with curves, results and samples."""
        return self.workdir / "report.html"

    @overload
    def generate(self, prompt: str = "", *, num_samples: None = None, **settings: Any) -> str: ...

    @overload
    def generate(self, prompt: str = "", *, num_samples: int, **settings: Any) -> list[str]: ...

    def generate(
        self, prompt: str = "", *, num_samples: int | None = None, **settings: Any
    ) -> str | list[str]:
        """What the model writes after `prompt`, or with `num_samples` a list of that many texts.

        `settings` are keys of the section `generate`: temperature=0.
        """
        _check_text("prompt", prompt)
        settings["num_samples"] = 1 if num_samples is None else num_samples
        changed = self._request({f"generate.{key}": value for key, value in settings.items()})
        loaded = self._loaded
        program = dataclasses.replace(
            loaded.program,
            config=dataclasses.replace(loaded.program.config, generate=changed.config.generate),
        )
        check_continues(program)
        with self._reusing_programs():
            (texts,) = Writer(dataclasses.replace(loaded, program=program)).write([prompt])
        return texts[0] if num_samples is None else texts

    def translate(self, text: str, **settings: Any) -> str:
        """What the model writes after it has read `text`, for a run of the task `translation`.

        `settings` are keys of the section `generate`: num_beams=5.
        """
        _check_text("text", text)
        changed = self._request({f"generate.{key}": value for key, value in settings.items()})
        program = self._loaded.program
        program = dataclasses.replace(
            program, config=dataclasses.replace(program.config, generate=changed.config.generate)
        )
        check_translates(program)
        with self._reusing_programs():
            return translate(Writer(dataclasses.replace(self._loaded, program=program)), [text])[0]

    def score(self, text: str) -> dict[str, float]:
        """How well the model predicts `text` and its end, read in pieces of at most data.seq_len tokens.

        Returns `loss` in nats per token, `tokens`, and `bits_per_byte` of the text's UTF-8 bytes.
        """
        _check_text("text", text)
        if not text:
            raise UserError("text='' has nothing to score; give some text")
        loaded = self._loaded
        check_continues(loaded.program)
        program, tokenizer = loaded.program, loaded.tokenizer
        # The tokenizer names what is no text, so that it comes before the text is encoded in any other way.
        tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        size = len(text.encode())
        losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
        pieces = _pieces(tokens, program.batch.seq_len)
        with self._reusing_programs():
            sums = score_pieces(losses, loaded.params, pieces, 1, program.probe_shape)
        loss, count = float(sums.loss[0]), int(sums.count[0])
        return {"loss": loss / count, "tokens": count, "bits_per_byte": loss / math.log(2) / size}

    @overload
    def classify(self, texts: str) -> Answer: ...

    @overload
    def classify(self, texts: list[str]) -> list[Answer]: ...

    def classify(self, texts: str | list[str]) -> Answer | list[Answer]:
        """The `label` of a text and its `probabilities`, {label: probability}; for a list of texts a list of these."""
        asked = [texts] if isinstance(texts, str) else list(texts)
        for text in asked:
            _check_text("text", text)
        classifier = TextClassifier(self._loaded)
        with self._reusing_programs():
            answers = classifier.classify(asked)
        return answers[0] if isinstance(texts, str) else answers

    def embed(self, texts: str | list[str], **settings: Any) -> np.ndarray:
        """The vector of a text, float32 [D], or of each text of a list, [texts, D].

        `settings` are keys of the section `embed`: pool="last", normalize=True.
        """
        asked = [texts] if isinstance(texts, str) else list(texts)
        for text in asked:
            _check_text("text", text)
        embedder = self._embedder(settings)
        with self._reusing_programs():
            vectors = embedder.embed(asked)
        return vectors[0] if isinstance(texts, str) else vectors

    def neighbours(
        self, text: str, texts: list[str] | None = None, **settings: Any
    ) -> list[tuple[str, float]]:
        """Those of `texts` that are nearest to `text`, or without `texts` the nearest tokens, each with its cosine.

        `settings` are keys of the section `embed`: neighbours=5.
        """
        for each in [text, *(texts or [])]:
            _check_text("text", each)
        embedder = self._embedder(settings)
        with self._reusing_programs():
            return embedder.nearest([text], texts)[0]

    def _embedder(self, settings: Mapping[str, Any]) -> TextEmbedder:
        changed = self._request({f"embed.{key}": value for key, value in settings.items()})
        program = self._loaded.program
        config = dataclasses.replace(program.config, embed=changed.config.embed)
        program = dataclasses.replace(program, config=config)
        return TextEmbedder(dataclasses.replace(self._loaded, program=program))

    def evaluate(self) -> dict[str, float]:
        """The scores of the task on the held-out documents, which it says where they are not those of the run."""
        loaded, request = self._loaded, self._request(mode="evaluate")
        corpus = read_corpus(request.config, request.derived, self.workdir)
        if corpus.held_out is None:
            raise UserError(
                "data.held_out_fraction=0 leaves nothing to evaluate on; train with a part held out"
            )
        if different := describe_difference(self.workdir, trained_on(self.workdir, loaded.update), corpus):
            say(f"{different}; these scores are of the documents here")
        with self._reusing_programs():
            return score_held_out(loaded.program, corpus, loaded.params)

    def _reusing_programs(self) -> contextlib.AbstractContextManager[None]:
        """A context manager in which compiled programs are looked up on disk, as the modes of the command line do."""
        config = self._loaded.program.config
        return reuse_programs(cache_directory(config), config.compute.compilation_cache_mb)

    @functools.cached_property
    def _loaded(self) -> Loaded:
        return load_checkpoint(self._request())

    def _request(self, changes: Mapping[str, Any] | None = None, mode: str = "generate") -> Any:
        raw = _changed(self.config, changes)
        return dispatch.make_request(mode, raw, self.workdir, checkpoint=self.checkpoint)


def _pieces(tokens: list[int], seq_len: int) -> Iterator[Piece]:
    """The text as packing cuts a document: each piece predicts at most `seq_len` tokens, every token once."""
    for start in range(0, len(tokens) - 1, seq_len):
        part = np.array(tokens[start : start + seq_len + 1])
        yield Piece(part, np.zeros(len(part) - 1, np.int64))


def _changed(raw: dict[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """`raw` with values of keys set, as the command line sets them."""
    if changes is not None and not isinstance(changes, Mapping):
        raise UserError(
            f"changes={_short(changes)} is no dict; give keys with their values, such as {{'train.num_updates': 40}}"
        )
    for key, value in (changes or {}).items():
        if not isinstance(key, str):
            raise UserError(
                f"changes has the key {_short(key)}; give the name of one, such as 'train.num_updates'"
            )
        several = takes_list(raw, key)
        if value is None or (isinstance(value, list | tuple) and not several):
            rule = "a list of values" if several else "one value"
            raise UserError(f"{key}={_short(value)} is not {rule}; give {rule}, or leave the key out")
        set_key(raw, key, list(map(str, value)) if isinstance(value, list | tuple) else [str(value)])
    return raw


def _path(name: str, value: object) -> pathlib.Path:
    """The path `value`. Raises UserError, which names the argument `name`, for something else than a path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name}={_short(value)} is no path; give one, such as 'runs/mine'")
    return pathlib.Path(value)


def _check_text(name: str, value: object) -> None:
    """Raises UserError, which names the argument `name`, if `value` is no text."""
    if not isinstance(value, str):
        raise UserError(f"{name}={_short(value)} is no text; give one str, and call again for the next text")


def _short(value: object) -> str:
    """`value` as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
