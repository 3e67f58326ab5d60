"""``fewstep trace``: what the model predicts at each step, as one labelled image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli_jobs import client_of, fail, settings, writing

if TYPE_CHECKING:
    from PIL.Image import Image


def trace(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: a .png.")],
    model: Annotated[str | None, typer.Option(help="A name from `fewstep models`.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=100, help="Number of steps: 1 to 4 for students.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; the others count up from it.")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, max=4, help="Number of images, one per row.")] = 1,
    diversity: Annotated[bool, typer.Option(help="Let the base do the first step.")] = False,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, max=50, help="Guidance scale; 1.0 turns guidance off.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to avoid; needs guidance.")] = "",
    server: Annotated[str | None, typer.Option(help="Use this server instead of this process.")] = None,
) -> None:
    """Show what the model predicts at each step of an image, labelled with the step's network, time and guidance."""
    if out.suffix.lower() != ".png":
        fail(f"--out {out}: give the name of a .png file", 2)
    options = {
        "model": model,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    if server is not None:
        with client_of(server) as client:
            strip = client.trace(prompt, seed=seed, n=n, diversity=diversity, **options)
    else:
        strip = _trace_here(prompt, tuple(range(seed, seed + n)), diversity, options)
    with writing(out):
        strip.save(out)
    typer.echo(out)


def _trace_here(prompt: str, seeds: tuple[int, ...], diversity: bool, options: dict[str, Any]) -> "Image":
    from service.engine.base import DiversityWish, DrawRequest, EngineError
    from service.here import draw_here, reason
    from service.tracing import draw_strip, title_of
    from service.tracing import trace as traced

    wish = DiversityWish() if diversity else None
    request = DrawRequest(prompt=prompt, seeds=seeds, diversity=wish, **options)
    try:
        ways = draw_here(settings(), lambda engine: traced(engine, request))
    except (EngineError, ValueError) as error:
        fail(reason(error))
    return draw_strip(title_of(prompt, ways), ways)
