"""Sample sheets: fixed prompts and seeds drawn by the student as it is now, one row per step count."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distillers.seeds import seed_of
from weights.contracts import StepSchedule
from weights.denoiser import Cond
from weights.drawing import draw
from weights.families.base import TextToImage

MARGIN, LINE = 56, 14


class Sheet:
    """Draws the same pictures again and again while a student learns."""

    def __init__(
        self,
        prompts: list[str],
        cond: Cond,
        schedules: dict[int, StepSchedule],
        seed: int,
        guidance_scale: float = 1.0,
        uncond: Cond | None = None,
    ) -> None:
        """
        Args:
            prompts: one per column.
            cond: their conditions, on the training device.
            schedules: a row for each.
            seed: the job's; every column has its own seed made from it.
            guidance_scale: the student's own default.
            uncond: a single row, for a student that is guided when it draws.
        """
        self.prompts = prompts
        self.cond = cond
        self.schedules = schedules
        self.guidance_scale = guidance_scale
        self.uncond = uncond
        self.seeds = [seed_of(seed, "sheet", column) % 2**32 for column in range(len(prompts))]

    @torch.no_grad()
    def draw(self, student: TextToImage) -> Tensor:
        """``(rows, columns, 3, H, W)`` uint8."""
        rows = []
        for steps in sorted(self.schedules):
            drawing = draw(
                student,
                self.cond,
                self.uncond,
                self.seeds,
                self.schedules[steps],
                guidance_scale=self.guidance_scale,
            )
            pictures = student.decode(drawing.latents)
            rows.append(pictures.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.stack(rows)

    def save(self, pictures: Tensor, path: Path) -> Tensor:
        """Writes the labelled PNG, atomically; returns it as ``(3, H, W)`` uint8.

        Args:
            pictures: what `draw` returned.
            path: of the PNG.
        """
        rows, columns, _, height, width = pictures.shape
        canvas = Image.new("RGB", (MARGIN + columns * width, LINE + rows * height), "white")
        pen = ImageDraw.Draw(canvas)
        for column, prompt in enumerate(self.prompts):
            pen.text((MARGIN + column * width + 2, 1), prompt[: max(4, width // 6)], fill="black")
        for row, steps in enumerate(sorted(self.schedules)):
            pen.text((2, LINE + row * height + height // 2 - 6), f"{steps} step{'s' * (steps > 1)}", fill="black")
            for column in range(columns):
                image = Image.fromarray(pictures[row, column].permute(1, 2, 0).numpy())
                canvas.paste(image, (MARGIN + column * width, LINE + row * height))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        canvas.save(temporary, "PNG")
        temporary.replace(path)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
