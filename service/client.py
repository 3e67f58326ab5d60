"""A small client of the server's API, for the command line and the demo."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from PIL import Image

JOBS = "/v1/distillation/jobs"


class ServerError(RuntimeError):
    """The server could not be reached, or it refused a request; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class DrawnPictures:
    """The images of one request, and their cost."""

    pictures: list[Image.Image]
    model: str
    steps: int
    evaluations: int
    """Network evaluations per image."""
    seconds: float
    """Generation time of the whole request."""


class Client:
    """A client of one server.

    Args:
        server: address, such as ``http://127.0.0.1:8000``.
        seconds: timeout of one response.
        key: API key, for a server that requires one.
    """

    def __init__(self, server: str, seconds: float = 300.0, key: str | None = None) -> None:
        self._server = server.rstrip("/")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._seconds = seconds
        self._http = httpx.Client(base_url=self._server, timeout=seconds, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def request(
        self, method: str, path: str, body: Any = None, *, patience: float = 0.0, **query: Any
    ) -> dict[str, Any]:
        """Send a request, and return the decoded response; ``patience`` is added to the timeout. Raises ServerError."""
        parameters = {name: value for name, value in query.items() if value is not None}
        try:
            timeout = self._seconds + patience
            answer = self._http.request(method, path, json=body, params=parameters, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"no answer from {self._server}: {error or type(error).__name__}") from error
        return _decoded(answer)

    def is_ready(self) -> bool:
        """Whether the server can generate images now."""
        try:
            return self._http.get("/health/ready", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def models(self) -> list[dict[str, Any]]:
        """The models that can generate images."""
        data: list[dict[str, Any]] = self.request("GET", "/v1/models")["data"]
        return data

    def draw(self, prompt: str, **options: Any) -> DrawnPictures:
        """Generate images from a prompt; options are the other fields of the request, and None leaves one out."""
        body = {"prompt": prompt, "response_format": "b64_json", **options}
        answer = self.request("POST", "/v1/images/generations", body)
        pictures = [_picture(item) for item in answer["data"]]
        drawing = answer["drawing"]
        return DrawnPictures(
            pictures=pictures,
            model=answer["model"],
            steps=drawing["steps"],
            evaluations=drawing["network_evaluations"],
            seconds=drawing["seconds"],
        )

    def trace(self, prompt: str, **options: Any) -> Image.Image:
        """What the model predicts at each step, as one labelled image; options are as for `draw`."""
        body = {"prompt": prompt, "response_format": "b64_json", "strip": True, **options}
        return _picture(self.request("POST", "/v1/images/trace", body)["strip"])

    def follow(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a job's events with their types, finally ``("job", job)`` with the ended job. Raises ServerError."""
        quiet = httpx.Timeout(30.0, read=60.0)
        try:
            with self._http.stream(
                "GET", f"{JOBS}/{job_id}/events", params={"stream": "true"}, timeout=quiet
            ) as answer:
                if not answer.is_success:
                    answer.read()
                    _decoded(answer)
                for kind, event in _server_sent(answer.iter_lines()):
                    yield kind, event
                    if kind == "job":
                        return
        except httpx.HTTPError as error:
            raise ServerError(f"the connection to {self._server} was lost: {error or type(error).__name__}") from error
        raise ServerError(
            f"{self._server} ended the stream before job {job_id} ended, which it does when it stops: try again"
        )


def _picture(item: dict[str, Any]) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
    picture.load()
    return picture.convert("RGB")


def _server_sent(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data" and value != "[DONE]":
            yield kind, json.loads(value)


def _decoded(answer: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = answer.json()
        if answer.is_success:
            return body
        error = body["error"]
        where = f" ({error['param']})" if error["param"] else ""
        raise ServerError(f"{answer.status_code}: {error['message']}{where}")
    except (ValueError, KeyError, TypeError) as error:
        start = answer.text[:200]
        raise ServerError(
            f"{answer.url} answered {answer.status_code} with something other than JSON: {start}"
        ) from error
