"""The command line: `python -m llmjax.main --config=configs/base.py [--mode=...] [--workdir=...] [--config.KEY=VALUE]`.

    train     train, or go on training, in --workdir (default: runs/NAME for configs/NAME.py); the default mode
    evaluate  held-out loss of a checkpoint
    generate  continue each --prompt, or each line of --prompt_file
    plan      say what the config means, compile its step for the devices at hand or --config.plan.topology, run nothing

With --workdir alone, the config saved there is used. Mistakes in what was asked for end with one sentence and exit
code 2.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL", "2"
)  # before jax is imported: XLA's own log says nothing to a user

import absl.logging
from absl import flags
from ml_collections import ConfigDict, config_flags

from llmjax.errors import UserError

MODES = ("train", "evaluate", "generate", "plan")


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of `argv`; UserError for whatever is not understood."""
    values = flags.FlagValues()
    workdir, given = _given(argv, "workdir"), _given(argv, "config")
    saved = pathlib.Path(workdir or "") / "config.json"
    if given is None and workdir and saved.exists():
        config = ConfigDict(json.loads(saved.read_text(encoding="utf-8")))
        config.data.sources = tuple(config.data.sources)
        config_flags.DEFINE_config_dict("config", config.lock(), flag_values=values, sys_argv=list(argv))
    else:
        config_flags.DEFINE_config_file(
            "config",
            None,
            "path of a config file, such as configs/base.py",
            flag_values=values,
            sys_argv=list(argv),
        )
    flags.DEFINE_string("workdir", None, "where everything of a run is written and found", flag_values=values)
    flags.DEFINE_enum("mode", "train", MODES, "what to do", flag_values=values)
    flags.DEFINE_multi_string(
        "prompt", [], "generate: a text to continue; may be repeated", flag_values=values
    )
    flags.DEFINE_string("prompt_file", None, "generate: a file with one prompt a line", flag_values=values)
    flags.DEFINE_string(
        "checkpoint", "latest", "evaluate, generate: latest, best or an update number", flag_values=values
    )
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(_one_sentence(error)) from None
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # how ml_collections reports keys that do not exist
        raise UserError(f"a --config key is not known: {_one_sentence(error)}") from None
    except OSError:
        raise UserError(
            f"--config={given} cannot be read; give the path of a config file, such as configs/base.py"
        ) from None
    if len(rest) > 1:
        raise UserError(f"the argument {rest[1]!r} is not a flag; write --name=value")
    if values.config is None:
        where = f"--workdir={workdir} holds no config.json and " if workdir else ""
        raise UserError(f"{where}--config is not given; try --config=configs/base.py")
    return values


def name_of(config_path: str) -> str:
    """base for configs/base.py: where a run goes without --workdir."""
    return pathlib.Path(config_path.split(":")[0]).stem


def read_prompts(values: flags.FlagValues) -> list[str]:
    """The prompts of --prompt and of --prompt_file, in this order."""
    prompts = list(values.prompt)
    if values.prompt_file is not None:
        path = pathlib.Path(values.prompt_file)
        if not path.is_file():
            raise UserError(f"--prompt_file={path} does not exist; give a text file with one prompt a line")
        prompts += [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    return prompts


def _given(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag, before the flags are defined."""
    for i, word in enumerate(argv):
        if word.lstrip("-").startswith(f"{name}="):
            return word.split("=", 1)[1]
        if word in (f"-{name}", f"--{name}") and i + 1 < len(argv):
            return argv[i + 1]
    return None


def _one_sentence(error: Exception) -> str:
    return " ".join(str(error).replace("\\n", " ").split()).strip("'\"")


def main(argv: Sequence[str]) -> int:
    """Runs one mode; the exit code."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    if any(word in ("-h", "--help", "-help") for word in argv):
        print(__doc__.strip())
        return 0
    try:
        values = parse(argv)
        prompts = read_prompts(values)
        from llmjax import modes  # after the flags, for jax takes seconds to import

        workdir = pathlib.Path(values.workdir or f"runs/{name_of(_given(argv, 'config'))}")
        return modes.run(
            values.mode, values.config.to_dict(), workdir, prompts=prompts, checkpoint=values.checkpoint
        )
    except UserError as error:
        print(f"llmjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nllmjax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv))
