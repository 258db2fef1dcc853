"""`ApiError`: a refusal or failure that a client is told, in OpenAI's form."""

from collections.abc import Mapping
from typing import Any, Literal

ErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
    "unavailable_error",
    "timeout_error",
]

_STATUS_OF: dict[ErrorType, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "server_error": 500,
    "unavailable_error": 503,
    "timeout_error": 504,
}


class ApiError(Exception):
    """What is wrong with a request, or what failed while it was answered.

    message: for people; never a traceback, a path or a prompt. code: for programs, such as "queue_full".
    param: the field that is wrong. status: by default the one of the type. headers: such as Retry-After.
    details: further members of the error object.
    """

    def __init__(
        self,
        message: str,
        type: ErrorType = "invalid_request_error",
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.type, self.code, self.param = message, type, code, param
        self.status = _STATUS_OF[type] if status is None else status
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body: {"error": {"message", "type", "param", "code"}}."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.details,
            }
        }
