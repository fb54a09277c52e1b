"""The command line: `python -m llmjax.main --config=configs/base.py [--mode=...] [--workdir=...] [--config.KEY=VALUE]`.

    train     train, or go on training, in --workdir (default: runs/NAME for configs/NAME.py); the default mode
    evaluate  held-out loss of a checkpoint; before there is one, of what --config.checkpoint.init_from names
    generate  continue each --prompt, or each line of --prompt_file
    plan      say what the config means, compile its step for the devices at hand or --config.plan.topology, run nothing

With --workdir alone, the config saved there is used. Mistakes in what was asked for end with one sentence and exit
code 2.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before jax is imported: XLA's log says nothing to a user

import absl.logging

from llmjax.errors import UserError
from llmjax.escapes import one_line, show
from llmjax.flags import name_of, parse, read_prompts


def main(argv: Sequence[str]) -> int:
    """Runs one mode; the exit code."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    if any(word in ("-h", "--help", "-help") for word in argv):
        show(__doc__.strip())
        return 0
    try:
        values, config = parse(argv)
        prompts = read_prompts(values)
        workdir = pathlib.Path(values.workdir or f"runs/{name_of(values.config)}")
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is a file; give a directory, or one to be made")
        from llmjax import modes  # after the flags, for jax takes seconds to import

        return modes.run(values.mode, config, workdir, prompts=prompts, checkpoint=values.checkpoint)
    except UserError as error:
        show(one_line(f"llmjax: {error}"), file=sys.stderr)
        return 2
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        sentence = f"llmjax: {error.filename} cannot be used ({error.strerror}); give another path"
        show(one_line(sentence), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        show("\nllmjax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv))
