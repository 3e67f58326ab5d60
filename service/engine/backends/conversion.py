"""Converts a torch module to an OpenVINO model without leaving anything behind in torch."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from service.engine.backends.silent_openvino import FrontEndManager, TorchScriptPythonDecoder

_turn = threading.Lock()
"""torch's trace registry belongs to the whole process, so only one conversion at a time may replace it."""


def convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Convert the module to an OpenVINO model of any shapes.

    This is `openvino.convert_model` without its second trace and its messages. The model's weights are the module's own
    memory, which it keeps alive.
    """
    # Not in inference mode, whatever the caller uses: tensors created there cannot be traced.
    with _registry_of_its_own(), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # The libraries check shapes with Python ifs, whose outcome here is the same for every number of rows.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # OpenVINO's usual input. It also converts torch.export's programs, but for fixed shapes and in twice the time.
        warnings.filterwarnings("ignore", r"`torch\.jit\.trace", DeprecationWarning)
        # The tracer reads every attribute of a module, including deprecated ones of transformers.
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing`", FutureWarning)
        decoder = TorchScriptPythonDecoder(
            module, example_input=tuple(each.clone() for each in inputs), trace_kwargs={"check_trace": False}
        )
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


@contextlib.contextmanager
def _registry_of_its_own() -> Iterator[None]:
    """Trace into a temporary registry: torch's own keeps a traced module's classes and graphs until the process ends.

    For the bundled UNet that would be 23 MB. Whatever another thread traces meanwhile may be registered here as well;
    it holds a reference to its registry, and stays valid.
    """
    state, recursive = cast(Any, torch.jit)._state, cast(Any, torch.jit)._recursive
    with _turn:
        before = state._python_cu, recursive._python_cu, recursive.concrete_type_store
        # torch's C++ code looks it up under this name each time.
        state._python_cu = recursive._python_cu = cast(Any, torch._C).CompilationUnit()
        recursive.concrete_type_store = recursive.ConcreteTypeStore()
        try:
            yield
        finally:
            state._python_cu, recursive._python_cu, recursive.concrete_type_store = before
