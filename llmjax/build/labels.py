"""The labels of a classification: found in data.sources where the config names none, and checked where it does.

A run keeps its labels, in their order, in its config.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from llmjax.build.corpus import cache_directory
from llmjax.build.hold_out import search_files
from llmjax.config.reading import complete_config
from llmjax.config.resolve import Derived, make_examples
from llmjax.config.schema import Config
from llmjax.data.examples.classified import PLACES
from llmjax.data.sources.fingerprint import Digests, corpus_fingerprint
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import Reading
from llmjax.data.sources.records import detect_format, places_of, read_records
from llmjax.errors import UserError
from llmjax.files import write_atomically
from llmjax.names import plain_name
from llmjax.workdir.contents import saved_config

# The most labels. A choice: a field with more different values is hardly one of labels, and the confusion matrix is
# quadratic in them.
MOST_LABELS = 1000
# The task whose labels these are.
TASK = "classification"


class Found(NamedTuple):
    """How many documents have a label, and the name of the first one."""

    number: int
    first: str


def with_labels(config: Config, derived: Derived) -> tuple[Config, Derived]:
    """`config` with the labels of its sources, sorted, if it has none of its own, and what follows from it.

    Raises UserError, which names file and line, if a document has a label that is none of the config's.
    """
    if config.task.name != TASK:
        return config, derived
    keys, found = config.tasks[TASK], find_labels(config)
    if not keys.labels:
        begins_with = _labels_of(config.checkpoint.init_from)
        if begins_with and found.keys() <= {*begins_with}:
            # Then the head that knows these labels can be taken over, too.
            found = dict.fromkeys(begins_with, Found(0, ""))
            keys = dataclasses.replace(keys, labels=begins_with)
        if len(found) < 2:
            raise UserError(
                f"data.sources have only the label {next(iter(found), '')!r}; give texts of at least two, or name "
                "the field with the labels in classification.label_field"
            )
        keys = dataclasses.replace(keys, labels=keys.labels or tuple(sorted(found)))
        config = dataclasses.replace(config, **{TASK: keys})
        return config, dataclasses.replace(derived, examples=make_examples(config))
    for label, (_, first) in found.items():
        if label not in keys.labels:
            raise UserError(
                f"{plain_name(first)} has the label {label!r}, which is none of classification.labels={keys.labels}; "
                "correct it, or train a new run with all labels"
            )
    return config, derived


def _labels_of(workdir: str) -> tuple[str, ...]:
    """The labels of the classification that was trained in `workdir`; none if there was another task, or no run."""
    saved = saved_config(pathlib.Path(workdir)) if workdir else None
    if saved is None or saved.get("task", {}).get("name") != TASK:
        return ()
    return tuple(complete_config(saved, workdir)[TASK]["labels"])


def find_labels(config: Config) -> dict[str, Found]:
    """The labels of the documents of data.sources and data.held_out_sources."""
    data, keys, cache = config.data, config.tasks[TASK], cache_directory(config)
    digests = Digests(cache / "digests.json")
    listing, held_out = search_files(data, digest_of=digests.of)
    digests.save()
    files = (*listing.files, *held_out)
    if keys.label_from in PLACES:
        return _count((places_of(file)[PLACES[keys.label_from]], file.name) for file in files)
    reading = dataclasses.replace(data.reading, fields=(data.text_field, keys.label_field))
    # Reading all texts takes a while, so that the labels of the same files are remembered.
    settings = json.dumps([corpus_fingerprint(files), dataclasses.astuple(reading)])
    path = cache / f"labels-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
    try:
        return {
            str(label): Found(int(count), str(first))
            for label, (count, first) in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    found = _count(_read_labels(files, reading))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found))
    return found


def _read_labels(files: Sequence[SourceFile], reading: Reading) -> Iterator[tuple[str, str]]:
    """Yields the label and the name of every document."""
    field = reading.fields[1]
    for file in files:
        if detect_format(file, reading) == "text":
            raise UserError(
                f"classification.label_from='field' and {file.path!r} is plain text, which has no field {field!r}; "
                "give a table or JSON, or set classification.label_from to file or folder"
            )
        for record in read_records(file, reading):
            yield str(record.fields[field]), record.name


def _count(pairs: Iterable[tuple[str, str]]) -> dict[str, Found]:
    """How often each label occurs among pairs of a label and the name of a document, and where first."""
    found: dict[str, Found] = {}
    for label, name in pairs:
        if not label:
            raise UserError(f"{plain_name(name)} has an empty label; name one, or remove the document")
        before = found.get(label, Found(0, name))
        found[label] = before._replace(number=before.number + 1)
        if len(found) > MOST_LABELS:
            raise UserError(
                f"data.sources have more than {MOST_LABELS:,} different labels; name the field with the labels in "
                "classification.label_field"
            )
    return found
