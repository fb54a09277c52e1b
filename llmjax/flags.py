"""Reads the command line: flags, a config file or the config of a run, and overrides --config.KEY=VALUE.

Everything here runs before jax is imported, so that a mistake is reported at once, in one sentence.
"""

from __future__ import annotations

import ast
import difflib
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from llmjax.config.file import load_config_file
from llmjax.config.help import describe_keys, key_comments, meant_keys
from llmjax.config.moved import MOVED, new_name
from llmjax.errors import UserError, reason_of
from llmjax.modes.table import MODES
from llmjax.names import check_local, plain_name
from llmjax.workdir.contents import saved_config


def make_flags() -> flags.FlagValues:
    """The flags of the command line, not yet set."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config", None, "a config file, or the name of one that comes along", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "where everything of a run is written and found", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(MODES), "what to do", flag_values=values)
    flags.DEFINE_multi_string(
        "prompt",
        [],
        "a text to go on with, classify, translate or embed; may be given several times",
        flag_values=values,
    )
    flags.DEFINE_string("prompt_file", None, "a file with a text a line for the same", flag_values=values)
    flags.DEFINE_boolean(
        "interactive", False, "generate, translate: read each line that is typed", flag_values=values
    )
    flags.DEFINE_string(
        "references",
        None,
        "translate: a file with the right translations, for BLEU and chrF",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "jsonl", False, "classify, embed: print a line of JSON for each text", flag_values=values
    )
    flags.DEFINE_multi_string(
        "neighbours",
        [],
        "embed: show which of the prompts, or without any which tokens, are nearest to this text",
        flag_values=values,
    )
    flags.DEFINE_string(
        "table", None, "embed: write the vectors of all tokens to this file, as word2vec", flag_values=values
    )
    flags.DEFINE_multi_string(
        "questions", [], "evaluate: answer the questions of this file by likelihood", flag_values=values
    )
    flags.DEFINE_string(
        "against", None, "evaluate: compare with these answers of another run", flag_values=values
    )
    flags.DEFINE_string(
        "profile",
        None,
        "train: trace the updates FIRST:END, without END, in WORKDIR/profile",
        flag_values=values,
    )
    flags.DEFINE_string(
        "checkpoint",
        "latest",
        "latest, best, an update number, or average:N",
        flag_values=values,
    )
    return values


def describe_help(argv: Sequence[str], opening: str) -> str | None:
    """The answer to `--help` (`opening`, flags, keys) or to `--help=SECTION`; None where neither is in `argv`."""
    for word, following in zip(argv, [*argv[1:], ""]):
        match = re.fullmatch(r"-h|--?help(?:=(.*))?", word, re.S)
        if match is None:
            continue
        # `--help optimizer` is `--help=optimizer`.
        if asked := match[1] or ("" if following.startswith("-") else following):
            return describe_keys(asked)
        values = make_flags()
        # absl adds a line to what a flag is for if it may be given several times.
        rows = [f"  --{name:<12} {(values[name].help or '').splitlines()[0].rstrip(';')}" for name in values]
        return f"{opening}\n\nflags\n" + "\n".join(rows) + f"\n\nkeys, by section\n\n{describe_keys()}"
    return None


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, dict[str, Any]]:
    """The flags of `argv`, and the config with every --config.KEY=VALUE applied. Raises UserError for anything not
    understood."""
    words, overrides = _split(argv)
    values = make_flags()
    try:
        rest = values(words)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        known = [key for section, keys in key_comments().items() for key in _whole_names(section, keys)]
        flag = difflib.get_close_matches(name, list(values), n=1, cutoff=0.7)
        close = [f"--{flag[0]}"] if flag else [f"--config.{key}" for key in meant_keys(name, known)]
        hint = f"; did you mean {' or '.join(close[:3])}?" if close else "; --help lists the flags and keys"
        raise UserError(f"--{name} is no flag{hint}") from None
    except flags.IllegalFlagValueError as error:
        if wrong := re.fullmatch(r"flag (--\w+=.*?): \('Non-boolean.*", str(error), re.S):
            raise UserError(f"{wrong[1]} is not true or false; give one, such as true") from None
        raise UserError(reason_of(error)) from None
    except flags.Error as error:
        raise UserError(reason_of(error)) from None
    if len(rest) > 1:
        raise UserError(f"the argument {rest[1]!r} is not a flag; write --name=value")
    for name in sorted({flag for mode in MODES.values() for flag in mode.flags}):
        modes = [mode for mode, known in MODES.items() if name in known.flags]
        if values[name].present and values.mode not in modes:
            uses = " or ".join(f"--mode={mode}" for mode in modes)
            raise UserError(f"--{name} is not heeded by --mode={values.mode}; leave it out, or give {uses}")
    if values.interactive and (values.prompt or values.prompt_file is not None):
        given = "--prompt" if values.prompt else "--prompt_file"
        raise UserError(
            f"--interactive reads its prompts from standard input, but {given} is given; leave one out"
        )
    if values.against is not None and not values.questions:
        raise UserError(
            "--against compares answers to --questions, which are not given; give both, or neither"
        )
    if values.workdir == "":
        raise UserError(
            "--workdir= is empty; give a folder, or leave it out for runs/NAME of configs/NAME.py"
        )
    config = load_config(values.config, values.workdir)
    # A run of an older version may lack the key that is set: then its config is completed first.
    if values.config is None and not overrides.keys() <= set(_keys(config)):
        config = _complete(config, values.workdir)
    # The keys with old names come last: the new name of some depends on optimizer.name, which may be set as well.
    for key in sorted(overrides, key=MOVED.__contains__):
        set_key(config, key, overrides[key])
    return values, _complete(config, values.workdir) if values.config is None else config


def _complete(saved: dict[str, Any], workdir: str) -> dict[str, Any]:
    """A saved config with defaults for the keys that are newer than it."""
    # Imported late, because the dataclasses of the config import jax.
    from llmjax.config.reading import complete_config

    return complete_config(saved, workdir)


def load_config(path: str | None, workdir: str | None) -> dict[str, Any]:
    """The config that get_config() of the file `path` returns, or without a file the config of the run in `workdir`."""
    if path is None:
        saved = saved_config(pathlib.Path(workdir)) if workdir else None
        if saved is None:
            where = f"--workdir={workdir} holds no config.json and " if workdir else ""
            raise UserError(f"{where}--config is not given; try --config=configs/base.py")
        return saved
    return load_config_file(path)


def set_key(config: dict[str, Any], key: str, texts: Sequence[str]) -> None:
    """Sets `key`, section.name, to the value that `texts` mean for the type of the key.

    If a key is given several times, the last value counts; a list takes all of them.
    """
    values, name = _place(config, key)
    values[name] = _value(values[name], key, texts)


def takes_list(config: dict[str, Any], key: str) -> bool:
    """Whether the value of `key`, section.name, is a list. Raises UserError for a key that is not known."""
    values, name = _place(config, key)
    return isinstance(values[name], list | tuple)


def _place(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The dict that holds the value of `key`, section.name, and its name there. Raises UserError for anything that is
    no key."""
    keys = _keys(config)
    if key not in keys:
        if key in MOVED:
            raise UserError(f"--config.{key} is not known; {_new_name_hint(key, config)}")
        close = meant_keys(key, keys)
        meant = " or ".join(f"--config.{known}" for known in close[:3])
        hint = f"did you mean {meant}?" if close else "configs/base.py lists every key"
        raise UserError(f"--config.{key} is not known; {hint}")
    section, _, name = key.rpartition(".")
    values = config[section] if section else config
    if isinstance(values[name], dict):
        raise UserError(
            f"--config.{key} is a section; set its keys, such as --config.{key}.{next(iter(values[name]))}"
        )
    return values, name


def _whole_names(section: str, keys: Sequence[tuple[str, str, str]]) -> list[str]:
    return [f"{section}.{key}" if section else key for key, _, _ in keys]


def _new_name_hint(key: str, config: dict[str, Any]) -> str:
    """What to write in place of `key`, which is an old name."""
    optimizer = config.get("optimizer", {}).get("name")
    new = new_name(key, optimizer)
    if new is None:
        return f"optimizer.name={optimizer!r} never read it, so leave it out"
    return f"did you mean --config.{new}?"


def _keys(config: dict[str, Any]) -> list[str]:
    """The full names of all sections and keys."""
    keys = [*config]
    for section, values in config.items():
        keys += [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
    return keys


def _value(old: Any, key: str, texts: Sequence[str]) -> object:
    if isinstance(old, list | tuple):
        return tuple(part for text in texts for part in _strings(text))
    text = texts[-1]
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return type(old)(text)
    except (KeyError, ValueError):
        rule = {bool: "true or false", int: "a whole number", float: "a number"}[type(old)]
        raise UserError(
            f"--config.{key}={text} is not {rule}; give one, such as {str(old).lower()}"
        ) from None


def _strings(text: str) -> tuple[str, ...]:
    """The parts of a text that looks like ('a', 'b'), else `text` alone, as is the name of a file."""
    if not text.lstrip().startswith(("(", "[", "'", '"')) or os.path.lexists(text):
        return (text,)
    try:
        parsed = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return (text,)
    return tuple(map(str, parsed)) if isinstance(parsed, list | tuple) else (text,)


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits `argv` into words that are no overrides and the values of --config.KEY=VALUE (or KEY VALUE), by key."""
    words: list[str] = []
    overrides: dict[str, list[str]] = {}
    rest = iter(argv)
    for word in rest:
        match = re.fullmatch(r"--?config\.([^=]*)(=?)(.*)", word, re.S)
        if match is None:
            words.append(word)
            continue
        key, equals, text = match.groups()
        # --config.KEY VALUE: the next word is the value, unless it is a flag itself.
        if not equals and (text := next(rest, "--")).startswith("--"):
            raise UserError(f"{word} has no value; write {word}=VALUE")
        overrides.setdefault(key, []).append(text)
    return words, overrides


def name_of(config_path: str) -> str:
    """The name of a config file without folder and suffix: base for configs/base.py. A run is written there by
    default."""
    return pathlib.Path(config_path.split(":")[0]).stem


def read_prompts(values: flags.FlagValues) -> list[str]:
    """The prompts of --prompt and of --prompt_file, in this order; `--prompt_file=-` is standard input."""
    prompts = [_as_utf8(prompt) for prompt in values.prompt]
    if values.prompt_file is not None:
        check_local(values.prompt_file, f"--prompt_file={values.prompt_file}")
        path = pathlib.Path(values.prompt_file)
        try:
            # Any path that can be read will do, such as the pipe that a shell makes of <(...).
            data = sys.stdin.buffer.read() if values.prompt_file == "-" else path.read_bytes()
        except (OSError, ValueError) as error:
            absent = isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError))
            reason = "does not exist" if absent else f"cannot be read ({getattr(error, 'strerror', error)})"
            raise UserError(
                f"--prompt_file={path} {reason}; give a text file with one prompt a line, or - for standard input"
            ) from None
        try:
            text = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file={path} is not UTF-8 at byte {error.start}; correct it") from None
        lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
        if not MODES[values.mode].keeps_empty:
            lines = [line for line in lines if line]
        if not any(lines):
            raise UserError(
                f"--prompt_file={path} has no line with text; write one prompt a line, or leave it out"
            )
        prompts += lines
    return prompts


def _as_utf8(prompt: str) -> str:
    """`prompt` as the UTF-8 that was typed, also where Python reads command lines in another encoding (LC_ALL=C)."""
    try:
        prompt.encode()
        return prompt
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(prompt).decode("utf-8")
    except UnicodeError:
        raise UserError(
            f"--prompt={plain_name(prompt)} is not UTF-8; give text in UTF-8, or a --prompt_file"
        ) from None


def read_table(values: flags.FlagValues) -> pathlib.Path | None:
    """The file that --table names, which must lie on a disk of this machine; None where it is not given."""
    if values.table is None:
        return None
    check_local(values.table, f"--table={values.table}")
    if not values.table or pathlib.Path(values.table).is_dir():
        raise UserError(f"--table={values.table} is no name of a file; give one, such as vectors.txt")
    return pathlib.Path(values.table)


def read_profile(values: flags.FlagValues) -> range:
    """The updates that --profile=FIRST:END names, the last of them END - 1; none where it is not given."""
    text = values.profile
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
    if match is None:
        raise UserError(
            f"--profile={text} is not FIRST:END; give the first update and the one after the last, such as 100:110"
        )
    first, end = int(match[1]), int(match[2])
    if first < 1:
        raise UserError(f"--profile={text} begins at update {first}; updates are counted from 1")
    if end <= first:
        raise UserError(
            f"--profile={text} names no update, because END is the one after the last; --profile={first}:{first + 10} "
            "has ten"
        )
    return range(first, end)
