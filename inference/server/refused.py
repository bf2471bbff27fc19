"""The answer to a request that is not served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn


class Refused(Exception):
    """Answers a request with an HTTP status and an error in OpenAI's shape. `param`: the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict:
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def wrong(name: str | None, message: str, code: str | None = None) -> NoReturn:
    raise Refused(400, message, name, code)


def missing(model: str, served: str) -> Refused:
    return Refused(404, f"The model {shown(model)} does not exist: this server has {served}", "model", "model_not_found")


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
