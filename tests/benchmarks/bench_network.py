"""Times what drawing is made of, by backend: one network call, the decoder, the text encoder, and whole draws.

    python -m tests.benchmarks.bench_network [--base emoji-base] [--out runs/bench.json] [--threads N] [--seconds 2]

Prints a table and writes JSON with the machine's description, so that results can be dated, kept and compared.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from service.engine.backends import make_backend
from service.settings import Settings
from weights.contracts import StepSchedule
from weights.drawing import draw, draw_base
from weights.families import TextToImage, load

BATCHES = (1, 4, 16)
SCHEDULES = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}
PROMPT = "red apple"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long one kind of call took, in milliseconds."""

    backend: str
    what: str
    batch: int
    median: float
    fastest: float
    slowest: float
    calls: int

    @property
    def per_picture(self) -> float:
        """Milliseconds of the median call, shared among its pictures."""
        return self.median / self.batch


def measure(call: Callable[[], Any], device: torch.device, seconds: float, fewest: int = 3) -> list[float]:
    """Milliseconds of each call, after one that warms up; calls are repeated for about ``seconds``."""
    call()
    times: list[float] = []
    while len(times) < fewest or sum(times) < seconds * 1000:
        finish(device)
        started = time.perf_counter()
        call()
        finish(device)
        times.append((time.perf_counter() - started) * 1000)
    return times


def finish(device: torch.device) -> None:
    """Wait for the device: it works on after the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls(model: TextToImage, batch: int, base_steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed at one batch size, by name."""
    device = model.device
    prompts = [PROMPT] * batch
    cond = model.encode_prompts(prompts)
    uncond = model.encode_prompts([""])
    seeds = list(range(batch))
    x_t = torch.randn(batch, *model.latent_shape(), generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.full((batch,), 0.5, device=device)

    def student(steps: int) -> Callable[[], Any]:
        schedule = StepSchedule(timesteps=SCHEDULES[steps])
        return lambda: model.decode(draw(model, model.encode_prompts(prompts), None, seeds, schedule).latents)

    def base() -> Any:
        drawing = draw_base(model, model.encode_prompts(prompts), uncond, seeds, base_steps, model.default_guidance)
        return model.decode(drawing.latents)

    return {
        "network, one call": lambda: model.denoiser(x_t, t, cond),
        "decoder": lambda: model.decode(x_t),
        "text encoder": lambda: model.encode_prompts(prompts),
        **{f"whole draw, {steps} step{'s' if steps > 1 else ''}": student(steps) for steps in SCHEDULES},
        f"whole draw, base at {base_steps} steps, guidance {model.default_guidance:g}": base,
    }


@torch.inference_mode()
def run(backend: str, model: TextToImage, seconds: float, batches: list[int], base_steps: int) -> list[Timing]:
    """Every timing at every batch size, of a model that the backend has prepared."""
    timings = []
    for batch in batches:
        for what, call in calls(model, batch, base_steps).items():
            times = measure(call, model.device, seconds)
            timings.append(
                Timing(
                    backend=backend,
                    what=what,
                    batch=batch,
                    median=statistics.median(times),
                    fastest=min(times),
                    slowest=max(times),
                    calls=len(times),
                )
            )
    return timings


def machine(device: torch.device) -> dict[str, Any]:
    """What the timings were taken on."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "openvino": _version("openvino"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    """None where it is not installed, as it need not be beside a GPU."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(timings: list[Timing], title: str) -> Table:
    """The timings to look at."""
    made = Table("backend", "what", title=title)
    for heading in ("batch", "median ms", "fastest", "slowest", "ms a picture", "calls"):
        made.add_column(heading, justify="right")
    for t in sorted(timings, key=lambda t: (t.what, t.batch)):  # stable: the backends one below the other
        figures = (t.median, t.fastest, t.slowest, t.per_picture)
        made.add_row(t.backend, t.what, str(t.batch), *(f"{figure:.1f}" for figure in figures), str(t.calls))
    return made


def backends(device: torch.device) -> list[str]:
    """All that the device has."""
    return ["torch", "openvino"] if device.type == "cpu" else ["torch"]


def timed(name: str, options: argparse.Namespace) -> list[Timing]:
    """A backend's timings.

    Raises:
        ValueError: there is no such family, or the backend cannot be had.
        FileNotFoundError: there is no such base.
    """
    settings = Settings(
        backend=name,
        family=options.family,
        dtype=options.dtype,
        cache=options.cache,
        threads=options.threads,
        max_batch=max(options.batches),
    )
    device = torch.device(options.device)
    automatic = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if options.dtype == "auto" else options.dtype)
    backend = make_backend(settings, device, dtype)
    model = backend.prepare(load(options.family, options.base, device, dtype))
    return run(name, model, options.seconds, options.batches, options.base_steps)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji-base", help="bundled base, pipeline folder or hub id (%(default)s)")
    parser.add_argument("--family", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backends", nargs="+", choices=["torch", "openvino"], help="all that the device has (default)"
    )
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/cache"), help="of what OpenVINO converts (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--base-steps", type=int, default=25)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        timings = [timing for backend in options.backends or backends(device) for timing in timed(backend, options)]
    except (FileNotFoundError, ValueError) as error:
        print(f"nothing to time: {error}", file=sys.stderr)
        return 2
    facts = {**machine(device), "base": options.base, "dtype": options.dtype, "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(timing), "per_picture": timing.per_picture} for timing in timings]
    options.out.write_text(json.dumps({"machine": facts, "milliseconds": rows}, indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else 120).print(
        table(timings, f"{options.base}, {options.dtype}, {facts['device']}, {facts['threads']} threads")
    )
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
