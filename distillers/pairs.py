"""Pairs of noise and the picture that the teacher's ODE solver makes of it, kept on disk between restarts."""

from pathlib import Path

import torch
from torch import Tensor

from distillers.checkpoint import load_checkpoint, save_checkpoint
from distillers.methods.base import Setup, Workspace
from distillers.processes import Interrupted, agreed, place
from weights.denoiser import Cond
from weights.diffusion.guidance import Guided
from weights.diffusion.samplers import ImageNoise, initial_state, sample_ode, trailing_times

SHARD = 64


class TeacherPairs:
    """A fixed set of pairs; the noise is not stored, its seed follows from the pair's number."""

    def __init__(self, workspace: Workspace, setup: Setup, count: int) -> None:
        self.workspace = workspace
        self.setup = setup
        self.count = count
        self._pictures = torch.empty(0)
        self._rows = torch.empty(0, dtype=torch.int64)

    def noise(self, pairs: Tensor) -> Tensor:
        """Unit noise of those pairs, ``(B, ...)`` float32 on the training device."""
        seeds = [self.workspace.seed("pair", number) for number in pairs.tolist()]
        return ImageNoise(seeds, self.setup.latent_shape, self.setup.device)()

    def make(self, steps: int, guidance_scale: float) -> None:
        """Draws every pair that is not on disk yet: ``steps`` (guided: twice as many) evaluations of the teacher each.

        Args:
            steps: of DDIM, trailing times.
            guidance_scale: the teacher's; 1.0 is off.
        """
        ends = [(start, min(start + SHARD, self.count)) for start in range(0, self.count, SHARD)]
        rank, processes = place()
        for first in range(0, len(ends), processes):
            for start, end in ends[first + rank : first + rank + 1]:
                self._made(start, end, steps, guidance_scale)
            self._tick(ends[min(first + processes, len(ends)) - 1][1])
        shards = [load_checkpoint(self._made(start, end, steps, guidance_scale))[0] for start, end in ends]
        self._pictures, self._rows = (torch.cat([shard[name] for shard in shards]) for name in ("pictures", "rows"))

    def _tick(self, done: int) -> None:
        """A sign of life; where one process is to stop, all do, or the others would wait for it."""
        stopped = None
        try:
            self.workspace.tick("teacher pairs", done, self.count)
        except Interrupted as error:
            stopped = error
        if agreed(stopped is not None, self.setup.device):
            raise stopped or Interrupted("stopped while teacher pairs")

    def _made(self, start: int, end: int, steps: int, guidance_scale: float) -> Path:
        """The file of these pairs, made where it is not on disk: another process's may be on another machine's."""
        path = self.workspace.folder / f"pairs-{steps}-{guidance_scale:g}-{start:06d}-{end:06d}.safetensors"
        if not path.exists():
            self._make_shard(path, torch.arange(start, end), steps, guidance_scale)
        return path

    @torch.no_grad()
    def _make_shard(self, path: Path, pairs: Tensor, steps: int, guidance_scale: float) -> None:
        generator = torch.Generator().manual_seed(self.workspace.seed("pair rows", int(pairs[0])))
        rows = torch.randint(self.workspace.prompts, (len(pairs),), generator=generator)
        teacher = Guided(self.setup.teacher, self.setup.uncond, guidance_scale)
        x_t = initial_state(self.noise(pairs), teacher.schedule)
        pictures = sample_ode(teacher, x_t, trailing_times(steps), self.workspace.conditions(rows))
        save_checkpoint(path, {"pictures": pictures.half(), "rows": rows}, {"steps": steps})

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """Noise ``(B, ...)``, the teacher's pictures ``(B, ...)`` float32, and the conditions they were drawn with."""
        pairs = torch.randint(self.count, (count,), generator=generator)
        target = self._pictures[pairs].to(self.setup.device, torch.float32)
        return self.noise(pairs), target, self.workspace.conditions(self._rows[pairs])
