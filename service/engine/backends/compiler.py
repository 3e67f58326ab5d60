"""From a part of a model to programs that OpenVINO runs, one for each shape; both are kept on disk.

A part is converted once, for all shapes. A program is compiled for one: static shapes took half the time of dynamic ones on
two cores of an AMD EPYC (Zen 4, 2026-11-24; the bundled UNet, one row). A compiled program holds its weights packed as its
own kernels want them, so each shape's takes memory of its own; on disk all share the converted part's weights.
"""

import copy
import hashlib
import inspect
import io
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.engine.backends.cache import Cache
from service.engine.backends.silent_openvino import FrontEndManager, TorchScriptPythonDecoder, openvino
from weights.families.base import Part

log = logging.getLogger(__name__)

Precision = Literal["f32", "bf16"]
Shapes = tuple[tuple[int, ...], ...]

DEVICE = "CPU"
MODEL = "model.xml"
WEIGHTS = "model.bin"
TRACED_ROWS, CHECKED_ROWS = 2, 3
"""A conversion that took a number of rows for a constant shows at another number."""
TOLERANCE: dict[Precision, float] = {"f32": 1e-3, "bf16": 0.1}
"""Largest root mean square error of a conversion, relative to the answers; about 1e-6 and 0.01 are usual."""


class WrongConversion(ValueError):
    """A converted part answers otherwise than the module it was made from."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A part as OpenVINO knows it, for all shapes. It outlasts its folder, whose weights stay mapped."""

    folder: Path
    model: Any
    numbers: int
    """Of its weights."""


class Compiler:
    """Converts parts and compiles programs of them; safe from any thread.

    Args:
        cache: where both are kept.
        precision: what programs compute in; ``auto`` is bf16 where the processor has it.
        threads: that one call uses; every core when None.
    """

    def __init__(self, cache: Cache, precision: Precision | Literal["auto"], threads: int | None) -> None:
        self._core = openvino.Core()
        self._cache = cache
        abilities = self._core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        self.precision: Precision = ("bf16" if "BF16" in abilities else "f32") if precision == "auto" else precision
        self._processor = [self._core.get_property(DEVICE, "FULL_DEVICE_NAME"), *abilities]
        self._properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Left to itself, a system wakes both of two streams on one core, where they wait for each other. Fewer threads
            # than cores stay free to go where nothing else runs: two servers would pin the same ones.
            "ENABLE_CPU_PINNING": threads is None,
            "CACHE_MODE": "OPTIMIZE_SIZE",  # exported programs refer to the weights' file
            # A pass that makes kernels of several operations; it crashes the process on the bundled UNet in f32 (2026.4.1,
            # Zen 4), and without it programs took no longer.
            "SNIPPETS_MODE": "DISABLE",
        }
        self._threads = threads or _cores()
        if threads is not None:
            self._properties["INFERENCE_NUM_THREADS"] = threads

    def streams(self, rows: int) -> int:
        """Parts of a batch that are computed at the same time, by as many threads fewer each.

        Threads that share one small layer wait for each other after each; those with parts of their own do not. Parts of one
        row gained nothing.
        """
        streams = 1
        while 2 * streams <= min(self._threads, rows // 2) and rows % (2 * streams) == 0:
            streams *= 2
        return streams

    def converted(self, part: Part) -> Converted:
        """The converted part, from the cache or made now.

        Raises:
            WrongConversion: it does not compute what the part's module computes.
            RuntimeError: OpenVINO cannot convert it.
            OSError: the disk takes no more.
        """
        key = _key(part)
        known = self._cache.get(key)
        if known is not None:
            return self._read(known)
        log.info("converting a %s for OpenVINO", part.config.get("class", type(part.module).__name__))
        module = _in_float32(part.module)

        def write(folder: Path) -> None:
            openvino.save_model(_convert(module, _inputs(part, TRACED_ROWS)), folder / MODEL, compress_to_fp16=False)
            self._check(module, _inputs(part, CHECKED_ROWS), self._read(folder))

        return self._read(self._cache.put(key, write))

    def compile(self, part: Converted, shapes: Shapes, streams: int = 1) -> Any:
        """A part's program for inputs of these shapes, so many at the same time, from the cache or compiled now."""
        properties = self._properties | (
            {"NUM_STREAMS": streams, "PERFORMANCE_HINT": "THROUGHPUT"} if streams > 1 else {}
        )
        facts = json.dumps([shapes, self._processor, properties])
        path = part.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.blob"
        blob = self._cache.get_file(path)
        if blob is not None:
            try:
                told = {**properties, "WEIGHTS_PATH": str(part.folder / WEIGHTS)}
                return self._core.import_model(io.BytesIO(blob), DEVICE, told)
            except RuntimeError as error:
                log.warning("%s cannot be used and will be made again: %s", path, error)
        program = self._compile(part, shapes, properties)
        exported = io.BytesIO()
        program.export_model(exported)
        self._cache.put_file(path, exported.getvalue())
        return program

    def _read(self, folder: Path) -> Converted:
        numbers = (folder / WEIGHTS).stat().st_size // 4
        return Converted(folder=folder, model=self._core.read_model(folder / MODEL), numbers=numbers)

    def _compile(self, part: Converted, shapes: Shapes, properties: dict[str, Any]) -> Any:
        model = part.model.clone()
        model.reshape(dict(enumerate(map(list, shapes))))
        return self._core.compile_model(model, DEVICE, properties)

    def _check(self, module: nn.Module, inputs: tuple[Tensor, ...], converted: Converted) -> None:
        program = self._compile(converted, tuple(tuple(tensor.shape) for tensor in inputs), self._properties)
        answer = infer([program.create_infer_request()], [inputs])
        with torch.inference_mode():
            expected = module(*inputs)
        size = expected.square().mean().sqrt().clamp(min=1e-6)  # an untrained network may answer with nothing but zeros
        error = float((answer - expected).square().mean().sqrt() / size)
        if not error <= TOLERANCE[self.precision]:
            raise WrongConversion(
                f"the converted {type(module).__name__} answers {error:.2g} off the module's own answers, relative to them; "
                f"in {self.precision} at most {TOLERANCE[self.precision]:g} is allowed"
            )


class Program(nn.Module):
    """A part that OpenVINO runs: for any number of rows, in batches of fixed sizes.

    Args:
        compiler: compiles the programs, each when it is first needed.
        part: what it takes the place of.
        batches: sizes to compile for, rising from 1. More rows than the last one take several calls; fewer than one of them
            are filled up by repeating the last row, and rows do not see each other.

    Raises:
        WrongConversion, RuntimeError, OSError: see `Compiler.converted`.
    """

    def __init__(self, compiler: Compiler, part: Part, batches: Sequence[int]) -> None:
        super().__init__()
        self._compiler, self._batches = compiler, batches
        self._part = compiler.converted(part)
        self._requests: dict[tuple[Shapes, int], list[Any]] = {}

    @property
    def most_bytes(self) -> int:
        """About what it takes in memory once every batch size was drawn in."""
        return self._part.numbers * (2 if self._compiler.precision == "bf16" else 4) * len(self._batches)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Answers in float32, as many as rows."""
        answers = [
            self._batch(chunk) for chunk in zip(*(each.split(self._batches[-1]) for each in inputs), strict=True)
        ]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _batch(self, inputs: tuple[Tensor, ...]) -> Tensor:
        rows = len(inputs[0])
        missing = next(size for size in self._batches if size >= rows) - rows
        if missing:
            inputs = tuple(torch.cat([each, each[-1:].expand(missing, *each.shape[1:])]) for each in inputs)
        streams = self._compiler.streams(rows + missing)
        chunks = list(zip(*(each.chunk(streams) for each in inputs), strict=True))
        return infer(self._requests_of(chunks[0], streams), chunks)[:rows]

    def _requests_of(self, inputs: tuple[Tensor, ...], streams: int) -> list[Any]:
        """As many requests of one program as there are streams."""
        shapes = tuple(tuple(each.shape) for each in inputs)
        if (shapes, streams) not in self._requests:
            program = self._compiler.compile(self._part, shapes, streams)
            self._requests[shapes, streams] = [program.create_infer_request() for _ in range(streams)]
        return self._requests[shapes, streams]


def infer(requests: Sequence[Any], chunks: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """What a program answers to chunks of rows, each by its own request and all at the same time; in memory of its own."""
    given = [[_plain(each).detach().contiguous().numpy() for each in inputs] for inputs in chunks]
    if len(requests) == 1:
        return torch.from_numpy(requests[0].infer(given[0], share_inputs=True)[0])
    try:
        for request, inputs in zip(requests, given, strict=True):
            request.start_async(inputs, share_inputs=True)
    finally:
        for request in requests:  # all of them, whatever one of them raised: none may be running when it is used again
            request.wait()
    return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])


def _convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The module as an OpenVINO model of any shapes: `openvino.convert_model`, without its second trace and its messages."""
    # Not inference mode, whatever the caller is in: tensors made there cannot be traced.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # The libraries check shapes with Python's own ifs, whose outcome here is the same for every number of rows.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # OpenVINO's usual way in; what torch.export gives it converts as well, but for fixed shapes and in twice the time.
        warnings.filterwarnings("ignore", r"`torch\.jit\.trace", DeprecationWarning)
        # The tracer looks at every attribute of a module, old names of transformers among them.
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing`", FutureWarning)
        decoder = TorchScriptPythonDecoder(
            module, example_input=tuple(each.clone() for each in inputs), trace_kwargs={"check_trace": False}
        )
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(part: Part, rows: int) -> tuple[Tensor, ...]:
    return tuple(map(_plain, part.example(rows)))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _in_float32(module: nn.Module) -> nn.Module:
    """The module, or a copy in float32: programs take and give float32, whatever their own precision is."""
    kept = {each.dtype for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()}
    return module if kept <= {torch.float32} else copy.deepcopy(module).float()


def _key(part: Part) -> str:
    """Of all that decides what a part converts to: weights, configuration, and the code that reads them."""
    digest = hashlib.sha256()
    versions = {name: version(name) for name in ("openvino", "torch", "diffusers", "transformers")}
    facts = [versions, inspect.getsource(type(part.module)), part.config]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in part.module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
