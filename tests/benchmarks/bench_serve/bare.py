"""The bare calls of a request's networks in this process: what no server can be faster than, by the same means."""

import time
from dataclasses import dataclass

import torch

from tests.benchmarks.bench_serve.servers import Setup
from tests.benchmarks.bench_serve.traffic import Ask
from weights.bundled import STUDENTS
from weights.contracts import StudentManifest
from weights.denoiser import cond_repeat
from weights.drawing import draw
from weights.families import TextToImage, load
from weights.store import Store
from weights.students import load_student


@dataclass(frozen=True)
class Bare:
    """A student and its base."""

    base: TextToImage
    student: TextToImage
    manifest: StudentManifest

    @classmethod
    def load(cls, setup: Setup) -> "Bare":
        """The models that this server loads, run by the same means."""
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        folder = Store(setup.store, STUDENTS).open(setup.student)
        dtype = torch.float16 if setup.on_gpu else torch.float32
        base = load(folder.manifest.family, setup.base, setup.torch_device, dtype)
        return cls(base, load_student(folder, base), folder.manifest)

    @torch.inference_mode()
    def seconds(self, one: Ask) -> float:
        """Of the text encoder, the networks and the decoder for one request; up to the pixels, but no picture file."""
        started = time.perf_counter()
        seeds = [one.seed + index for index in range(one.n)]
        cond = self.base.encode_prompts([one.prompt])
        uncond = self.base.encode_prompts([""]) if one.guidance_scale != 1 else None
        schedule = self.manifest.schedules[one.steps]
        rows = cond_repeat(cond, one.n)
        drawing = draw(self.student, rows, uncond, seeds, schedule, guidance_scale=one.guidance_scale)
        self.base.decode(drawing.latents).cpu()
        return time.perf_counter() - started
