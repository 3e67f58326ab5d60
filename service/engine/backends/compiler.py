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
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.engine.backends.cache import Cache
from service.engine.backends.conversion import convert
from service.engine.backends.silent_openvino import openvino
from service.engine.leaving import Beside
from weights.families.base import Part

log = logging.getLogger(__name__)

Precision = Literal["f32", "bf16"]
Shapes = tuple[tuple[int, ...], ...]

DEVICE = "CPU"
MODEL = "model.xml"
WEIGHTS = "model.bin"
OPERATION_BYTES, MODEL_BYTES = 13_000, 6_000
"""Of each operation: in a compiled program, for each of its streams, and in the converted model. See `Compiler.bytes_of`."""
SPARE = 1.15
"""Times as much is counted: how much the allocator keeps differs from run to run."""
TRACED_ROWS, CHECKED_ROWS = 2, 3
"""A conversion that took a number of rows for a constant shows at another number."""
TOLERANCE: dict[Precision, float] = {"f32": 1e-3, "bf16": 0.1}
"""Largest root mean square error of a conversion, relative to the answers; about 1e-6 and 0.01 are usual."""


class WrongConversion(ValueError):
    """A converted part answers otherwise than the module it was made from."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A part as OpenVINO knows it, for all shapes. It outlasts its folder, whose weights stay mapped."""

    folder: Path | None
    """Where it is kept; None: nowhere, and its weights are those of the module that it was made from."""
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
        self._beside = Beside("compiling")
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
        """The converted part, from the cache or made now; where the disk does not take it, in memory alone.

        Raises:
            WrongConversion: it does not compute what the part's module computes.
            RuntimeError: OpenVINO cannot convert it.
        """
        key = _key(part)
        known = self._cache.get(key)
        if known is not None:
            try:
                return self._read(known)
            except (OSError, RuntimeError) as error:  # deleted since
                log.warning("%s cannot be read and will be made again: %s", known, error)
        name = part.config.get("class", type(part.module).__name__)
        log.info("converting a %s for OpenVINO", name)
        module, checked = _in_float32(part.module), _inputs(part, CHECKED_ROWS)
        model = convert(module, _inputs(part, TRACED_ROWS))
        kept: list[Converted] = []

        def write(folder: Path) -> None:
            openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
            kept.append(self._read(folder))
            self._check(module, checked, kept[-1])

        try:
            folder = self._cache.put(key, write)
            return replace(kept[0], folder=folder)  # read while it was written: by now it may be deleted
        except WrongConversion:
            raise
        except (OSError, RuntimeError) as error:  # the latter is what OpenVINO says of a full disk
            here = Converted(folder=None, model=model, numbers=_numbers(model))
            self._check(module, checked, here)  # fails as well where the disk is not to blame
            self._cache.cannot_keep(f"a converted {name}", error)
            return here

    def compile(self, part: Converted, shapes: Shapes, streams: int = 1) -> Any:
        """A part's program for inputs of these shapes, so many at the same time, from the cache or compiled now."""
        properties = self._properties | (
            {"NUM_STREAMS": streams, "PERFORMANCE_HINT": "THROUGHPUT"} if streams > 1 else {}
        )
        if part.folder is None:
            return self._compile(part, shapes, properties)
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

    def bytes_of(self, part: Converted, row: Shapes, batches: Sequence[int]) -> int:
        """Memory of a part's programs for all these batch sizes: no less than was measured, and up to twice as much.

        Nothing is shared between batch sizes: each program packs the weights anew, and has code and descriptions of its own
        for every operation, and those once more for each further stream. Of the bundled models on two cores of an AMD EPYC
        (Zen 4, OpenVINO 2026.4, 2026-11-28), anonymous memory in MiB at 1, 2, 4 and 8 rows, the last two in two streams:

            network, 10.7 M numbers: 39 + 38 + 51 + 52 in bf16, 57 + 58 + 69 + 71 in f32; the model itself 9
            decoder, 0.5 M numbers: 3 + 4 + 6 + 10 in bf16
            text encoder, 22.6 M numbers: 23 + 25 + 28 + 28 in bf16, since its table of words is read from the disk

        Weights that are mapped from the cache's files are the system's to take back, and are not counted.

        Args:
            part: the converted part.
            row: shapes of its inputs at a batch of one row.
            batches: sizes to compile for.
        """
        width = 2 if self.precision == "bf16" else 4
        model = part.model.clone()
        model.reshape(dict(enumerate(map(list, row))))
        computing = [op for op in model.get_ops() if op.get_type_name() != "Constant"]
        largest = max(sum(math.prod(out.get_shape()) for out in op.outputs()) for op in computing)
        graph = OPERATION_BYTES * len(computing)
        programs = sum(
            part.numbers * width + self.streams(rows) * graph + 2 * rows * largest * width for rows in batches
        )
        whole = programs + MODEL_BYTES * len(computing) + (part.numbers * 4 if part.folder is None else 0)
        return int(SPARE * whole)

    def later(self, work: Callable[[], object]) -> None:
        """Do this on a thread that is there to compile beside the drawing, after all that it has to do already."""
        self._beside.put(work)

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


def infer(requests: Sequence[Any], chunks: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """What a program answers to chunks of rows, each by its own request and all at the same time; in memory of its own."""
    given = [[plain(each).detach().contiguous().numpy() for each in inputs] for inputs in chunks]
    if len(requests) == 1:  # set as tensors: what `infer` looks for in arrays takes a tenth of a millisecond
        for index, array in enumerate(given[0]):
            requests[0].set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
        requests[0].infer()
        return torch.from_numpy(requests[0].get_output_tensor(0).data.copy())
    try:
        for request, inputs in zip(requests, given, strict=True):
            request.start_async(inputs, share_inputs=True)
    finally:
        for request in requests:  # all of them, whatever one of them raised: none may be running when it is used again
            request.wait()
    return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])


def _numbers(model: Any) -> int:
    """Of a converted model's weights."""
    return sum(math.prod(op.get_output_shape(0)) for op in model.get_ops() if op.get_type_name() == "Constant")


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(part: Part, rows: int) -> tuple[Tensor, ...]:
    return tuple(map(plain, part.example(rows)))


def plain(tensor: Tensor) -> Tensor:
    """As programs take it: float32, or whole numbers."""
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
