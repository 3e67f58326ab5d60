"""The bare calls of a request's networks in this process: what no server can be faster than, by the same means."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.backends import make_backend
from service.engine.startup import device_of, dtype_of
from service.settings import Settings
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
    batches: Sequence[int]
    """What the calls are made for."""

    @classmethod
    def load(cls, settings: Settings, name: str) -> "Bare":
        """The models as a server with these settings loads them: on its device, and with its backend."""
        folder, device = Store(settings.store, STUDENTS).open(name), device_of(settings)
        dtype = dtype_of(settings, device)
        backend = make_backend(settings, device, dtype)
        loaded = load(settings.family, folder.manifest.base.id, device, dtype)
        base = backend.prepare(loaded)
        student = backend.prepare(load_student(folder, loaded), base)
        return cls(base, student, folder.manifest, backend.batches)

    @torch.inference_mode()
    def seconds(self, one: Ask) -> float:
        """Of the text encoder, the network and the decoder for one request without guidance, up to the pixels.

        Its pictures share every call, which has rows for nobody where none is made for so few.
        """
        assert one.guidance_scale == 1, "the bare calls are those of requests without guidance"
        started = time.perf_counter()
        rows = min(batch for batch in self.batches if batch >= one.n)
        cond = cond_repeat(self.base.encode_prompts([one.prompt]), rows)
        drawing = draw(self.student, cond, None, range(one.seed, one.seed + rows), self.manifest.schedules[one.steps])
        self.base.decode(drawing.latents)[: one.n].cpu()
        return time.perf_counter() - started
