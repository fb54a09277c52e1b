"""`--mode=serve`: a server with the paths of OpenAI's API, and a page to chat with.

Requests are written side by side, each in a slot of `generate/engine.py`. The server ends well at SIGTERM and Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import time

import jax

from llmjax.errors import UserError
from llmjax.generate.engine import Engine, Order
from llmjax.modes.chat import check_converses
from llmjax.modes.embed import TextEmbedder
from llmjax.modes.generate import Loaded, check_continues, load, no_text
from llmjax.modes.request import Request
from llmjax.serve.asked import Served
from llmjax.tasks.table import conversation_keys
from llmjax.terminal.lines import say, warn
from llmjax.terminal.stages import on_terminal, working

# The environment variable with the key that clients must send.
KEY = "LLMJAX_API_KEY"
# Keys of the section `generate` that are not read, and their values that say so.
UNREAD = {"num_samples": 1, "num_beams": 1, "slots": 0}


def run(request: Request) -> int:
    """Answers requests until the server is told to stop, and returns exit code 0."""
    check_installed()
    # Imported late: these packages are an extra.
    from llmjax.serve.server import Service, listen

    config = request.config
    if jax.process_count() > 1:
        raise UserError("--mode=serve answers at one address, and there are several processes; start one")
    for key, value in UNREAD.items():
        if (given := getattr(config.generate, key)) != value:
            raise UserError(
                f"generate.{key}={given} is without effect for --mode=serve, where each request says what it asks for "
                f"and serve.slots how many texts are written at a time; leave it at {value}"
            )
    # Before the checkpoint is read: an address that is taken is told at once.
    with listen(config.serve) as listening:
        loaded = load(request, on_terminal)
        served = make_served(loaded, name_of(request.workdir))
        with working("compiling", on_terminal):
            engine = make_engine(loaded, served)
        key = os.environ.get(KEY, "")
        if not (key or config.serve.is_local):
            warn(
                f"note: serve.host={config.serve.host!r} lets others ask without a key; set {KEY} to ask for one"
            )
        host, port = listening.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        Service(served, engine, key).run_on(
            listening, lambda: say(f"{served.name} is at {address}/v1, and a page to chat with at {address}/")
        )
    say("the server has stopped")
    return 0


def check_installed() -> None:
    """UserError without the packages of the extra `serve`."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--mode=serve needs the package {package}, which is not installed; pip install 'llmjax[serve]'"
            )


def name_of(workdir: pathlib.Path) -> str:
    """The name of the model, by which requests ask for it: that of the folder of its run."""
    return workdir.absolute().name or "llmjax"


def make_served(loaded: Loaded, name: str) -> Served:
    """What the server serves of a checkpoint. UserError for a model that does not go on with a text."""
    program, tokenizer = loaded.program, loaded.tokenizer
    form, no_chat = None, ""
    try:
        form = check_converses(loaded)
    except UserError as error:
        no_chat = str(error)
        check_continues(program)
    embedder = TextEmbedder(loaded)
    limit, config = program.model.position_limit, program.config
    context = config.serve.max_context or config.data.seq_len
    return Served(
        name,
        int(time.time()),
        tokenizer,
        config.generate,
        config.serve,
        min(context, limit) if limit else context,
        embedder.embed,
        embedder.size_of,
        form,
        no_chat,
        conversation_keys(config.task.name, config.tasks).system if form else "",
    )


def make_engine(loaded: Loaded, served: Served) -> Engine:
    """An engine for the checkpoint, whose programs for short texts are compiled."""
    banned = [i for i in no_text(loaded.tokenizer) if served.format is None or i != served.format.end]
    engine = Engine(
        loaded.program.model, loaded.params, served.config.slots, served.context, banned_ids=banned
    )
    engine.submit(Order((loaded.tokenizer.eos_id,), min(2, served.context)))
    while not engine.is_idle:
        engine.step()
    return engine
