"""Errors as OpenAI's API tells them: a status, and an object with a sentence."""

from __future__ import annotations

from typing import Any

# The type of an error by its status, in OpenAI's words.
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
# The code of a prompt that is too long, by which clients know that a shorter one helps.
TOO_LONG = "context_length_exceeded"


class ApiError(Exception):
    """A request that is not carried out. `message` is one sentence.

    status  of HTTP, a key of KINDS
    code    a word for programs, if there is one
    param   the field of the request that is wrong, if it is one
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The answer to the request."""
        kind = KINDS[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
