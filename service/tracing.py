"""What a model predicts at each step of an image, and one labelled image that shows it.

"Distilling Diversity and Control in Diffusion Models" (Gandikota & Bau, arXiv 2503.10637) calls this DT-visualization:
the x_0 that the network predicts from x_t, decoded at every step. It shows where an image's structure is decided: a
base settles it in its first steps, a few-step student at once, and with diversity one sees what the base hands over.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from PIL import Image, ImageDraw

from service.demo_sheet import GAP, INK, PALE, PAPER, font, wrap
from service.engine.base import Drawn, DrawRequest, Engine, Preview, StepTaken

EVERY_STEP = 10_000
"""More previews than any image has steps, to get all of them."""
CELL = 112
COLUMNS = 10
"""Steps in one line of a strip; further ones go on the next line."""
LABEL_WIDTH, CAPTION = 72, 36
LEGS = {"base": (217, 119, 6), "student": (37, 99, 235)}
"""Colour of the bar under a step, by the network that made it."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """The path of one image from noise."""

    drawn: Drawn
    images: tuple[Image.Image, ...]
    """The x_0 predicted at each step of ``drawn.path``; the last one is the image itself."""

    @property
    def steps(self) -> list[tuple[StepTaken, Image.Image]]:
        """Each step with the model's prediction."""
        return list(zip(self.drawn.path, self.images, strict=True))


async def trace(engine: Engine, request: DrawRequest) -> list[Way]:
    """Generate images, and collect what the model predicted at each step, decoded by the real decoder.

    Returns:
        one path per seed, in order.

    Raises:
        EngineError: one of its subclasses.
    """
    wanted = replace(request, previews=EVERY_STEP, exact_previews=True)
    seen: list[dict[int, Image.Image]] = [{} for _ in request.seeds]
    pictures: dict[int, Drawn] = {}
    # The protocol can only promise an AsyncIterator; engines promise that it can be closed.
    async with aclosing(cast("AsyncGenerator[Preview | Drawn, None]", engine.stream(wanted))) as items:
        async for item in items:
            if isinstance(item, Preview):
                seen[item.index][item.step] = item.image
            else:
                pictures[item.index] = item
    ways = []
    for index, states in enumerate(seen):
        drawn = pictures[index]
        assert sorted(states) == list(range(1, len(drawn.path))), (
            f"previews {sorted(states)} of {len(drawn.path)} steps"
        )
        ways.append(Way(drawn=drawn, images=(*(states[step] for step in sorted(states)), drawn.image)))
    return ways


def title_of(prompt: str, ways: Sequence[Way]) -> str:
    """Heading of a strip: the prompt and the model."""
    return f"{prompt} ({ways[0].drawn.model})"


def draw_strip(title: str, ways: Sequence[Way]) -> Image.Image:
    """Draw the paths as one image: a row (or several) for each, with the network, time and guidance of every step."""
    columns = min(COLUMNS, max(len(way.images) for way in ways))
    lines = [
        (way.drawn.seed if start == 0 else None, start, way.steps[start : start + columns])
        for way in ways
        for start in range(0, len(way.images), columns)
    ]
    width = max(LABEL_WIDTH + columns * (CELL + GAP) + GAP, 360)
    heading = wrap(title, width - 2 * GAP, font(16))
    top = 20 * len(heading) + 2 * GAP
    strip = Image.new("RGB", (width, top + len(lines) * (CELL + CAPTION + GAP)), PAPER)
    pen = ImageDraw.Draw(strip)
    pen.multiline_text((GAP, GAP), "\n".join(heading), fill=INK, font=font(16))
    for row, (seed, start, steps) in enumerate(lines):
        y = top + row * (CELL + CAPTION + GAP)
        if seed is not None:
            label = wrap(f"seed {seed}", LABEL_WIDTH - 2 * GAP, font(12))
            pen.multiline_text((GAP, y), "\n".join(label), fill=INK, font=font(12), spacing=2)
        for column, (step, image) in enumerate(steps):
            x = LABEL_WIDTH + column * (CELL + GAP)
            strip.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x, y + CELL, x + CELL - 1, y + CELL + 3), fill=LEGS[step.leg])
            pen.text((x, y + CELL + 5), f"{start + column + 1}. {step.leg}", fill=INK, font=font(12))
            pen.text((x, y + CELL + 19), caption(step), fill=PALE, font=font(12))
    return strip


def caption(step: StepTaken) -> str:
    """A step's time, and its guidance if that is on."""
    guided = f", w = {step.guidance_scale:g}" if step.guidance_scale != 1 else ""
    return f"t = {step.t:.3g}{guided}"
