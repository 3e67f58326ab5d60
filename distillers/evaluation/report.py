"""The output of an evaluation: ``metrics.json``, contact sheets and curves as PNG, and one page ``report.html``."""

import base64
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distillers.evaluation import curves, sheets
from distillers.evaluation.bars import Bar
from distillers.evaluation.measure import Quality, Real, Spread, as_json
from distillers.evaluation.protocol import Protocol

SHEET_COLUMNS = 8
COMPARED = 10
"""Number of the sheet's prompts that are shown side by side for all subjects."""


@dataclass(frozen=True)
class Results:
    """All measurements of an evaluation."""

    protocol: Protocol
    quick: bool
    data: str
    """Source of captions and real images: ``emoji``, or a folder."""
    extractor: str
    real: Real
    qualities: list[Quality]
    spreads: list[Spread]
    bars: list[Bar]
    machine: dict[str, str]
    finished: str


def machine(device: str) -> dict[str, str]:
    """Facts about the machine that timings depend on."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def now() -> str:
    """The current time in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def write(results: Results, folder: Path) -> Path:
    """Writes all files into ``folder``; returns the path of the HTML report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics_json(results), indent=2) + "\n", encoding="utf-8")
    pictures = write_pictures(results, folder)
    path = folder / "report.html"
    path.write_text(html(results, pictures), encoding="utf-8")
    return path


def metrics_json(results: Results) -> dict[str, Any]:
    """The measurements as JSON."""
    protocol = results.protocol
    return {
        "finished": results.finished,
        "quick": results.quick,
        "protocol": {
            "data": results.data,
            "digest": protocol.digest,
            "captions": len(protocol.held_out),
            "choices": protocol.choices,
            "pictures": len(protocol.drawings),
            "coarse_pictures": len(protocol.coarse_drawings),
            "reference_pictures": len(protocol.reference),
        },
        "machine": results.machine,
        "extractor": results.extractor,
        "real": as_json(results.real),
        "quality": as_json(results.qualities),
        "diversity": as_json(results.spreads),
        "bars": [bar.as_json() for bar in results.bars],
    }


def write_pictures(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Writes curves and sheets; returns each with its heading, in the report's order."""
    protocol = results.protocol
    path = curves.plot(folder / "curves.png", results.real, results.qualities, results.spreads, results.extractor)
    made = [("Curves", path)]
    if protocol.sheet:
        made.append(("The same prompts, every model", _comparison(results, folder / "comparison.png")))
    made += [(f"Coarse prompts: {s.subject.title}", _spread_sheet(protocol, s, folder)) for s in results.spreads]
    for quality in results.qualities:
        if not protocol.sheet:
            break
        image = sheets.sheet(quality.shown, protocol.sheet, SHEET_COLUMNS, title=quality.subject.title)
        name = folder / f"sheet-{quality.subject.slug}.png"
        made.append((f"Held-out prompts: {quality.subject.title}", sheets.save(image, name)))
    return made


def html(results: Results, pictures: Sequence[tuple[str, Path]]) -> str:
    """The report as one self-contained page; all text in it is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    inlined = [(title, base64.b64encode(path.read_bytes()).decode("ascii")) for title, path in pictures]
    return environment.get_template("report.template.html").render(results=results, pictures=inlined)


def _comparison(results: Results, path: Path) -> Path:
    # Evenly spaced over the sheet, which is ordered by category.
    prompts = results.protocol.sheet
    rows = [len(prompts) * row // min(COMPARED, len(prompts)) for row in range(min(COMPARED, len(prompts)))]
    columns = [quality.subject.title for quality in results.qualities]
    pictures = [torch.stack([quality.shown[row] for quality in results.qualities]) for row in rows]
    image = sheets.table(pictures, [prompts[row] for row in rows], columns, title="Same prompt, same seed")
    return sheets.save(image, path)


def _spread_sheet(protocol: Protocol, spread: Spread, folder: Path) -> Path:
    rows = list(spread.shown)
    columns = [f"seed {seed}" for seed in protocol.coarse_seeds]
    image = sheets.table(rows, protocol.coarse[: len(rows)], columns, title=spread.subject.title)
    return sheets.save(image, folder / f"coarse-{spread.subject.slug}.png")


def _processor() -> str:
    """The processor's name from Linux, if available, else from Python."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
