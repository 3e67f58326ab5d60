"""Pairs of noise and the image that the teacher's ODE solver generates from it, kept on disk across restarts."""

from pathlib import Path

import torch
from torch import Tensor

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.methods.base import Setup, Workspace
from distillers.processes import agreed, place, together
from weights.denoiser import Cond, Denoiser
from weights.diffusion.samplers import ImageNoise, initial_state, sample_ode, trailing_times
from weights.drawing import guided

SHARD = 64
LATENTS_AT_ONCE = 16 * 64 * 64
"""Latent positions per teacher call: 16 images of 512 pixels, 4 of 1024; guidance doubles the rows."""
WHAT = "drawing teacher's pictures"


class TeacherPairs:
    """A fixed set of pairs. The noise is not stored, since its seed is derived from the pair's index."""

    def __init__(self, workspace: Workspace, setup: Setup, count: int) -> None:
        self.workspace = workspace
        self.setup = setup
        self.count = count
        self._pictures = torch.empty(0)
        self._rows = torch.empty(0, dtype=torch.int64)

    def noise(self, pairs: Tensor) -> Tensor:
        """Unit noise of the given pairs, ``(B, ...)`` float32 on the training device."""
        seeds = [self.workspace.seed("pair", number) for number in pairs.tolist()]
        return ImageNoise(seeds, self.setup.latent_shape, self.setup.device)()

    def make(self, steps: int, guidance_scale: float, interval: tuple[float, float] | None = None) -> None:
        """Generates all pairs that are not on disk: ``steps`` evaluations of the teacher each, twice as many if guided.

        Args:
            steps: of DDIM, with trailing times.
            guidance_scale: the teacher's; 1.0 is off.
            interval: guide only where ``low <= t <= high``; everywhere when left out.
        """
        ends = [(start, min(start + SHARD, self.count)) for start in range(0, self.count, SHARD)]
        kind = f"{steps}-{guidance_scale:g}" + ("" if interval is None else "-in-{:g}-{:g}".format(*interval))
        files = [self.workspace.folder / f"pairs-{kind}-{a:06d}-{b:06d}.safetensors" for a, b in ends]
        teacher = guided(self.setup.teacher, self.setup.uncond, guidance_scale, interval)

        def made(number: int) -> Path:
            """Generates the shard if it is not on this disk; another process may run on another machine."""
            if not files[number].exists():
                self._make_shard(files[number], torch.arange(*ends[number]), steps, teacher)
            return files[number]

        device, (rank, processes) = self.setup.device, place()
        if agreed(any(not file.exists() for file in files), device):
            tick = together(self.workspace.tick, device)
            tick(WHAT, 0, self.count)  # the first shard can take minutes
            for first in range(0, len(ends), processes):
                if first + rank < len(ends):
                    made(first + rank)
                tick(WHAT, ends[min(first + processes, len(ends)) - 1][1], self.count)
        shards = [load_checkpoint(made(number))[0] for number in range(len(ends))]
        self._pictures, self._rows = (torch.cat([shard[name] for shard in shards]) for name in ("pictures", "rows"))

    @torch.no_grad()
    def _make_shard(self, path: Path, pairs: Tensor, steps: int, teacher: Denoiser) -> None:
        generator = torch.Generator().manual_seed(self.workspace.seed("pair rows", int(pairs[0])))
        rows = torch.randint(self.workspace.prompts, (len(pairs),), generator=generator)
        parts = []
        for own, asked in zip(*(torch.split(each, self._at_once()) for each in (pairs, rows)), strict=True):
            x_t = initial_state(self.noise(own), teacher.schedule)
            parts.append(sample_ode(teacher, x_t, trailing_times(steps), self.workspace.conditions(asked)))
        pictures = torch.cat(parts)
        save_checkpoint(path, {"pictures": pictures.half(), "rows": rows}, {"steps": steps})

    def _at_once(self) -> int:
        """Number of a shard's images to generate together."""
        _, height, width = self.setup.latent_shape
        return max(1, LATENTS_AT_ONCE // (height * width))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """Noise ``(B, ...)``, the teacher's images ``(B, ...)`` float32, and the conditions of these images."""
        pairs = torch.randint(self.count, (count,), generator=generator)
        target = self._pictures[pairs].to(self.setup.device, torch.float32)
        return self.noise(pairs), target, self.workspace.conditions(self._rows[pairs])
