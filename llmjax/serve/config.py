"""The section `serve` of the config: where the server listens, and its limits."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from llmjax.errors import UserError
from llmjax.ranges import Range, Unset, check_ranges

# The addresses that only programs of the same machine reach.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The `serve` section of the config, for mode serve.

    host              the address to listen at
    port              its port; 0 takes a free one, which the server prints
    slots             texts that are written at the same time
    max_context       tokens of a prompt and its answer
    max_text_tokens   the most new tokens that a request may ask for in a text
    max_queue         texts that may wait for a slot; more are refused with status 429
    max_body_bytes    the largest request
    max_seconds       how long a request may take
    shutdown_seconds  how long texts may go on after the server was told to stop
    """

    host: Annotated[str, Unset("127.0.0.1")]
    port: Annotated[int, Range(0, 65535), Unset(8000)]
    slots: Annotated[int, Range(1, 4096), Unset(8)]
    max_context: Annotated[int, Range(1, 2**30, "data.seq_len"), Unset(0)]
    max_text_tokens: Annotated[int, Range(1, 2**30), Unset(4096)]
    max_queue: Annotated[int, Range(0, 2**20), Unset(64)]
    max_body_bytes: Annotated[int, Range(1, 2**30), Unset(1_000_000)]
    max_seconds: Annotated[float, Range(0, 1e6, above=True), Unset(600.0)]
    shutdown_seconds: Annotated[float, Range(0, 1e6), Unset(10.0)]

    def __post_init__(self) -> None:
        check_ranges("serve", self)
        if not self.host:
            raise UserError(
                "serve.host='' is no address; use 127.0.0.1 for this machine alone, or 0.0.0.0 for all networks"
            )

    @property
    def is_local(self) -> bool:
        """Whether only programs of the same machine reach the server."""
        return self.host in LOOPBACK
