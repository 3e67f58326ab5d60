"""Converts parts of models to OpenVINO and compiles a program for each input shape. Both are cached on disk.

A part is converted once, for all shapes, but compiled for each: static shapes took half the time of dynamic ones on two
cores of an AMD EPYC (Zen 4, 2026-11-24; the bundled UNet, one row). A compiled program keeps its own copy of the
weights, packed for its kernels, so every shape takes more memory. On disk, all share the converted part's weights.
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
"""Bytes per operation: in a compiled program, for each stream, and in the converted model. See `Compiler.bytes_of`."""
SPARE = 1.15
"""Safety factor of memory estimates: how much the allocator retains differs from run to run."""
TRACED_ROWS, CHECKED_ROWS = 2, 3
"""Batch sizes for tracing and for checking: different, so that a number of rows taken as constant is detected."""
TOLERANCE: dict[Precision, float] = {"f32": 1e-3, "bf16": 0.1}
"""Largest accepted error of a conversion: root mean square, relative to the outputs; 1e-6 and 0.01 are usual."""


class WrongConversion(ValueError):
    """A converted part computes something other than the module it was made from."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A part in OpenVINO's format, for all shapes. It outlasts its folder, whose weights stay mapped."""

    folder: Path | None
    """Where it is cached; None if it is not, and its weights are those of the original module."""
    model: Any
    numbers: int
    """Number of weights."""


class Compiler:
    """Converts parts and compiles programs of them. Thread-safe.

    Args:
        cache: stores both.
        precision: what programs compute in; ``auto`` is bf16 if the processor supports it.
        threads: number of threads of one call; None for one per core.
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
            # Without pinning, the system wakes both of two streams on one core, where they wait for each other. Fewer
            # threads than cores stay unpinned, free to move to an idle core: two servers would pin the same ones.
            "ENABLE_CPU_PINNING": threads is None,
            "CACHE_MODE": "OPTIMIZE_SIZE",  # exported programs refer to the weights' file
            # Disables a pass that fuses operations into kernels. It crashes the process on the bundled UNet in f32
            # (2026.4.1, Zen 4), and programs are no slower without it.
            "SNIPPETS_MODE": "DISABLE",
        }
        self._beside = Beside("compiling")
        self._threads = threads or _cores()
        if threads is not None:
            self._properties["INFERENCE_NUM_THREADS"] = threads

    def streams(self, rows: int) -> int:
        """Into how many parts a batch is split, to be computed concurrently with proportionally fewer threads each.

        Threads that share one small layer have to synchronise after it; threads that have parts of their own do not.
        Parts of a single row gained nothing.
        """
        streams = 1
        while 2 * streams <= min(self._threads, rows // 2) and rows % (2 * streams) == 0:
            streams *= 2
        return streams

    def converted(self, part: Part) -> Converted:
        """The converted part, from the cache or converted now; kept in memory only if the disk does not accept it.

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
            return replace(kept[0], folder=folder)  # read while it was being written: it may be deleted by now
        except WrongConversion:
            raise
        except (OSError, RuntimeError) as error:  # OpenVINO raises RuntimeError if the disk is full
            here = Converted(folder=None, model=model, numbers=_numbers(model))
            self._check(module, checked, here)  # fails too, if the disk was not to blame
            self._cache.cannot_keep(f"a converted {name}", error)
            return here

    def compile(self, part: Converted, shapes: Shapes, streams: int = 1) -> Any:
        """A part's program for inputs of these shapes, with this many streams, from the cache or compiled now."""
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
        """Memory of a part's programs for all these batch sizes: at least what was measured, and at most twice that.

        Batch sizes share nothing: each program packs the weights again, and has code and metadata of its own for every
        operation, and for every further stream. For the bundled models on two cores of an AMD EPYC (Zen 4, OpenVINO
        2026.4, 2026-11-28), this is the anonymous memory in MiB at 1, 2, 4 and 8 rows, the last two with two streams:

            network, 10.7 M weights: 39 + 38 + 51 + 52 in bf16, 57 + 58 + 69 + 71 in f32; the model itself 9
            decoder, 0.5 M weights: 3 + 4 + 6 + 10 in bf16
            text encoder, 22.6 M weights: 23 + 25 + 28 + 28 in bf16, since its embedding table is read from the disk

        Weights mapped from the cache's files can be reclaimed by the system and are not counted.

        Args:
            part: the converted part.
            row: shapes of its inputs at a batch size of 1.
            batches: batch sizes to compile for.
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
        """Run this on the thread that compiles in the background, after everything queued before."""
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
        size = expected.square().mean().sqrt().clamp(min=1e-6)  # an untrained network may output nothing but zeros
        error = float((answer - expected).square().mean().sqrt() / size)
        if not error <= TOLERANCE[self.precision]:
            raise WrongConversion(
                f"the output of the converted {type(module).__name__} has a relative error of {error:.2g}; in "
                f"{self.precision} at most {TOLERANCE[self.precision]:g} is allowed"
            )


def infer(requests: Sequence[Any], chunks: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The outputs for chunks of rows, each computed by its own request and all concurrently, in memory of their own."""
    given = [[plain(each).detach().contiguous().numpy() for each in inputs] for inputs in chunks]
    # Set as tensors: the checks that `infer` makes on arrays take a tenth of a millisecond.
    if len(requests) == 1:
        for index, array in enumerate(given[0]):
            requests[0].set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
        requests[0].infer()
        return torch.from_numpy(requests[0].get_output_tensor(0).data.copy())
    try:
        for request, inputs in zip(requests, given, strict=True):
            request.start_async(inputs, share_inputs=True)
    finally:
        # All of them, whatever one of them raised: none may be running when it is used again.
        for request in requests:
            request.wait()
    return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])


def _numbers(model: Any) -> int:
    """Number of weights of a converted model."""
    return sum(math.prod(op.get_output_shape(0)) for op in model.get_ops() if op.get_type_name() == "Constant")


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inputs(part: Part, rows: int) -> tuple[Tensor, ...]:
    return tuple(map(plain, part.example(rows)))


def plain(tensor: Tensor) -> Tensor:
    """The tensor as programs take it: float32 or integers."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _in_float32(module: nn.Module) -> nn.Module:
    """The module, or a float32 copy of it: programs take and return float32, whatever precision they compute in."""
    kept = {each.dtype for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()}
    return module if kept <= {torch.float32} else copy.deepcopy(module).float()


def _key(part: Part) -> str:
    """A hash of everything that determines the conversion: weights, configuration and the code that uses them."""
    digest = hashlib.sha256()
    versions = {name: version(name) for name in ("openvino", "torch", "diffusers", "transformers")}
    facts = [versions, inspect.getsource(type(part.module)), part.config]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in part.module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
