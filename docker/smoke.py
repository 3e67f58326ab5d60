"""Generates images and distils on a running server, as a client would: `smoke.py ADDRESS FOLDER [--after-restart]`.

It needs only Python, since it runs outside the image, and sends traffic only to the given address.
"""

import base64
import json
import struct
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

STUDENT = "smoke-student"
JOB = {
    "student": STUDENT,
    "method": "dmd2",
    "train": {"iterations": 2, "batch_size": 4, "checkpoint_every": 1, "sample_every": 1},
    "config": {"student_every": 1, "schedules": {"1": {"timesteps": [1.0]}, "2": {"timesteps": [1.0, 0.5]}}},
    "licence": "Apache-2.0",
}
JOB_SECONDS = 900


def ask(address: str, body: Any = None, status: int = 200) -> Any:
    """The decoded response to a GET, or to a POST if there is a body.

    Raises:
        SystemExit: the response has another status.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            got, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        got, content = error.code, error.read()
    if got != status:
        raise SystemExit(f"{address} answered {got} instead of {status}: {content.decode(errors='replace')[:2000]}")
    return json.loads(content)


def draw(server: str, folder: Path, name: str, **options: Any) -> float:
    """Generates one image into ``folder``, and returns the seconds it took, round trip included."""
    started = time.perf_counter()
    answer = ask(f"{server}/v1/images/generations", {"prompt": "red apple, noto emoji", "seed": 1, **options})
    seconds = time.perf_counter() - started
    picture = base64.b64decode(answer["data"][0]["b64_json"])
    size = struct.unpack(">II", picture[16:24])
    if picture[:8] != b"\x89PNG\r\n\x1a\n" or f"{size[0]}x{size[1]}" != answer["size"]:
        raise SystemExit(f"{name}: not a PNG of {answer['size']}")
    (folder / f"{name}.png").write_bytes(picture)
    print(f"  {name}: {answer['model']}, {answer['drawing']['steps']} steps, {seconds * 1000:.0f} ms", flush=True)
    return seconds


def distil(server: str) -> None:
    """Submits the short job and waits until it has succeeded."""
    job = ask(f"{server}/v1/distillation/jobs", JOB)
    started = time.monotonic()
    while job["status"] not in {"succeeded", "failed", "cancelled"}:
        if time.monotonic() - started > JOB_SECONDS:
            raise SystemExit(f"job {job['id']} is still {job['status']} after {JOB_SECONDS} s: {job['progress']}")
        time.sleep(2)
        job = ask(f"{server}/v1/distillation/jobs/{job['id']}")
    if job["status"] != "succeeded":
        raise SystemExit(f"job {job['id']} {job['status']}: {json.dumps(job['error'], indent=2)}")
    print(f"  job {job['id']} succeeded after {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    server, folder = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    models = {model["id"]: model for model in ask(f"{server}/v1/models")["data"]}
    print(f"  models: {', '.join(models)}", flush=True)
    if "--after-restart" not in sys.argv:
        draw(server, folder, "default")
        draw(server, folder, "base", model="emoji-base", steps=4)
        error = ask(f"{server}/v1/images/generations", {"prompt": "x", "model": "no-such-model"}, status=404)
        if not error["error"]["message"]:
            raise SystemExit(f"an error without a message: {error}")
        distil(server)
        models = {model["id"]: model for model in ask(f"{server}/v1/models")["data"]}
    if STUDENT not in models:
        raise SystemExit(f"{STUDENT} is not among the models: {', '.join(models)}")
    draw(server, folder, "student", model=STUDENT, steps=2, diversity=True)


if __name__ == "__main__":
    main()
