"""The torch engine: one thread owns torch, the models and the device, and draws one request after another.

Each request is drawn whole, its pictures in batches. The event loop only joins the line and waits.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from service.engine.base import Drawn, DrawRequest, EngineError, ModelInfo, NotReady, TimedOut
from service.engine.memory import default_budget
from service.engine.names import check_names
from service.engine.plan import Plan, check_size, plan_base, plan_student
from service.engine.residency import Residency, Resident
from service.engine.waiting import Ticket, WaitingLine
from service.settings import BadSettings, Settings
from weights.bundled import STUDENTS, resolve_base
from weights.contracts import StudentManifest
from weights.denoiser import Cond, cond_repeat
from weights.drawing import Drawing, draw, draw_base
from weights.families import families
from weights.store import Store

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_PROMPT = "red apple"
MOST_WAITING = 32
"""Requests that may wait."""


class _Abandoned(Exception):
    """Nobody waits for the picture at hand any more."""


class TorchEngine:
    """`service.engine.base.Engine` on one device. Build it with `from_settings`, which checks what it is given.

    Args:
        settings: bases, device, precision, limits.
        store: where students are.
        bundled: folder of the bundled students, the first of which is the default model where its base is served.
    """

    def __init__(self, settings: Settings, store: Store, bundled: Path | None = None) -> None:
        self._settings = settings
        self._device = _device(settings)
        self._residency = Residency(
            store,
            settings.bases,
            settings.family,
            self._device,
            _dtype(settings, self._device),
            settings.memory_bytes or default_budget(self._device),
            pinned=settings.pinned,
            aliases=settings.aliases,
        )
        self._bundled = Store(bundled).names() if bundled is not None else []
        self._line = WaitingLine(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._ready = False
        self._failure: str | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> "TorchEngine":
        """The engine over the settings' store and the bundled students.

        Raises:
            BadSettings: a base, the family, the default model or the device is not to be had.
        """
        if settings.family not in families():
            known_families = ", ".join(families())
            raise BadSettings(f"FEWSTEP_FAMILY: no family is named {settings.family!r}; there are: {known_families}")
        if settings.family == "stable_diffusion":
            for name in settings.bases:
                try:
                    resolve_base(name)
                except FileNotFoundError as error:
                    raise BadSettings(f"FEWSTEP_BASES: {error}") from None
        store = Store(settings.store, STUDENTS)
        check_names(settings, store)
        return cls(settings, store, STUDENTS)

    @property
    def ready(self) -> bool:
        """See `Engine.ready`."""
        return self._ready

    @property
    def failure(self) -> str | None:
        """See `Engine.failure`."""
        return self._failure

    async def start(self) -> None:
        """See `Engine.start`."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """See `Engine.stop`."""
        self._ready = False
        self._line.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def models(self) -> list[ModelInfo]:
        """See `Engine.models`."""
        self._check_ready()
        return self._residency.infos()

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """See `Engine.generate`."""
        self._check_ready()
        plan = await asyncio.to_thread(self._plan, request)
        ticket = Ticket(request=request, cost=plan.evaluations * len(request.seeds))
        self._line.join(ticket)
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                return await asyncio.wrap_future(ticket.result)
        except TimeoutError:
            raise TimedOut(f"the request took more than {self._settings.request_timeout:g} s") from None
        finally:
            self._line.leave(ticket)

    def _check_ready(self) -> None:
        if self._failure is not None:
            raise NotReady(f"the engine has failed: {self._failure}")
        if not self._ready:
            raise NotReady("the server is still loading its models, or stopping")

    def _default_model(self) -> str:
        if self._settings.default_model is not None:
            return self._settings.default_model
        for name in self._bundled:
            with contextlib.suppress(EngineError):  # one that cannot be read is nobody's default
                info = self._residency.info(name)
                if isinstance(info, StudentManifest) and info.base.id in self._settings.bases:
                    return name
        return self._settings.bases[0]

    def _plan(self, request: DrawRequest) -> Plan:
        """What would be drawn, from the disk's manifest alone: refuses a wrong request before it waits."""
        name = request.model if request.model is not None else self._default_model()
        info = self._residency.info(name)
        self._residency.check_loras(name, request.loras)
        if isinstance(info, StudentManifest):
            check_size(request, name, self._residency.size_of(info.base, info.family))
            return plan_student(request, info)
        check_size(request, name, info.size)
        return plan_base(request, info)

    def _work(self) -> None:
        """The thread: load, warm up, then draw until the line is closed."""
        try:
            self._prepare()
        except Exception as error:
            log.exception("the engine cannot start")
            self._failure = f"{type(error).__name__}: {error}"
            self._line.close()
            return
        self._ready = True
        log.info("ready to draw on %s", self._device)
        while (ticket := self._line.next()) is not None:
            if not ticket.result.set_running_or_notify_cancel():
                continue
            try:
                ticket.result.set_result(self._draw(ticket))
            except (EngineError, _Abandoned) as error:
                ticket.result.set_exception(error)
            except Exception as error:
                log.exception("drawing failed")
                failed = EngineError("the engine failed at this request; the server's log says why")
                failed.__cause__ = error
                ticket.result.set_exception(failed)
        self._residency.clear()

    def _prepare(self) -> None:
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        if self._device.type == "cuda":
            # Without it cuBLAS is not deterministic when it is asked to be.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._residency.load_bases()
        name = self._default_model()
        self._residency.pin(name)
        try:
            self._draw(Ticket(request=DrawRequest(model=name, prompt=WARM_PROMPT, seeds=(0,)), cost=1))
        except EngineError:
            if name in self._settings.bases:
                raise
            log.exception("the default model %r cannot draw; the others can be asked for", name)

    def _draw(self, ticket: Ticket) -> list[Drawn]:
        """The whole request, on this thread."""
        request = ticket.request
        started = time.perf_counter()
        name = request.model if request.model is not None else self._default_model()
        resident = self._residency.get(name, request.prompt, request.loras)
        plan = self._plan_resident(request, resident)
        per_batch = 1 if request.deterministic else self._settings.max_batch
        images: list[Image.Image] = []
        evaluations = plan.evaluations
        with torch.inference_mode(), _determinism(request.deterministic):
            cond = resident.base.encode_prompts([request.prompt])
            uncond = resident.base.encode_prompts([request.negative_prompt]) if plan.needs_uncond else None
            for start in range(0, len(request.seeds), per_batch):
                drawing = _draw_batch(resident, plan, cond, uncond, request.seeds[start : start + per_batch], ticket)
                images += to_images(resident.base.decode(drawing.latents))
                evaluations = drawing.evaluations
        seconds = time.perf_counter() - started
        self._line.measured(seconds, evaluations * len(request.seeds))
        manifest = resident.manifest
        job = manifest.job.sha256 if manifest is not None and manifest.job is not None else None
        return [
            Drawn(
                image=image,
                seed=seed,
                model=plan.model,
                steps=plan.steps,
                guidance_scale=plan.guidance_scale,
                diversity=plan.diversity,
                evaluations=evaluations,
                seconds=seconds,
                student=resident.member,
                base=manifest.base.id if manifest is not None else None,
                job=job,
                loras=resident.loras,
            )
            for image, seed in zip(images, request.seeds, strict=True)
        ]

    def _plan_resident(self, request: DrawRequest, resident: Resident) -> Plan:
        """The plan again, for what is in memory now: the student may have been published anew in the meantime."""
        if resident.manifest is not None:
            check_size(request, resident.manifest.name, resident.model.size)
            return plan_student(request, resident.manifest)
        return self._plan(request)


def _draw_batch(
    resident: Resident, plan: Plan, cond: Cond, uncond: Cond | None, seeds: tuple[int, ...], ticket: Ticket
) -> Drawing:
    """Latents of these seeds; raises where nobody waits for them any more."""

    def on_step(_step: int, _x0: Tensor) -> None:
        if ticket.abandoned.is_set():
            raise _Abandoned

    rows = cond_repeat(cond, len(seeds))
    if plan.schedule is None:
        return draw_base(resident.base, rows, uncond, seeds, plan.steps, plan.guidance_scale, on_step)
    return draw(
        resident.model,
        rows,
        uncond,
        seeds,
        plan.schedule,
        guidance_scale=plan.guidance_scale,
        base=resident.base,
        diversity=plan.diversity,
        on_step=on_step,
    )


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Pictures ``(B, 3, H, W)`` in [-1, 1] as RGB images, rounded as diffusers' image processor does."""
    pixels = ((pictures.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, where there are such; it warns where there are none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _device(settings: Settings) -> torch.device:
    """The device, where there is one.

    Raises:
        BadSettings: this machine has no such device.
    """
    wanted = settings.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise BadSettings(f"FEWSTEP_DEVICE: {wanted} was asked for, but torch sees {count} CUDA GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadSettings("FEWSTEP_DEVICE: mps was asked for, but torch sees no Apple GPU")
    return device


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision, which on a CPU is never float16.

    Raises:
        BadSettings: float16 was asked for, and the device is the CPU.
    """
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if settings.dtype == "float16" and device.type == "cpu":
        raise BadSettings("FEWSTEP_DTYPE: float16 needs a GPU; use float32 or bfloat16 on the CPU")
    return DTYPES[settings.dtype]
