"""Logging as text for people or JSON lines for machines. Each line has the id of the request that it is about.

Messages never contain prompts, keys or image ids: they name the request instead.
"""

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being handled in this context; None outside of requests."""


def choose_id(offered: str | None) -> str:
    """A request's id: the client's own if it is well-formed, so that it can find its requests here, else a new one."""
    if offered is not None and SANE_ID.fullmatch(offered):
        return offered
    return f"req_{secrets.token_hex(12)}"


class TextLines(logging.Formatter):
    """``time LEVEL logger: message [request id]``, followed by any traceback."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")

    def format(self, record: logging.LogRecord) -> str:
        """Format the line."""
        current = request_id.get()
        record.request = "" if current is None else f" [{current}]"
        return super().format(record)


class JsonLines(logging.Formatter):
    """One JSON object per line.

    Its fields are time (UTC), level, logger, message, request_id, the access log's fields, and exception.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str, log_format: LogFormat) -> None:
    """Send this process's log to standard error.

    This includes uvicorn's log, if uvicorn is told not to configure its own.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
