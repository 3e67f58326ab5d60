"""From a torch module to an OpenVINO model, leaving nothing behind in torch."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from service.engine.backends.silent_openvino import FrontEndManager, TorchScriptPythonDecoder

_turn = threading.Lock()
"""What torch registers traces in is the whole process's: one conversion at a time has its own."""


def convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The module as an OpenVINO model of any shapes: `openvino.convert_model`, without its second trace and its messages.

    The model's weights are the module's own memory, which it keeps.
    """
    # Not inference mode, whatever the caller is in: tensors made there cannot be traced.
    with _registry_of_its_own(), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
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


@contextlib.contextmanager
def _registry_of_its_own() -> Iterator[None]:
    """torch registers every traced module's classes and graphs for as long as the process lives; here, until it is used up.

    A trace of the bundled UNet would stay with 23 MB. What another thread traces meanwhile may be registered here too: it
    holds what it was registered in, and stays valid.
    """
    state, recursive = cast(Any, torch.jit)._state, cast(Any, torch.jit)._recursive
    with _turn:
        before = state._python_cu, recursive._python_cu, recursive.concrete_type_store
        # torch's C++ looks it up under this name each time.
        state._python_cu = recursive._python_cu = cast(Any, torch._C).CompilationUnit()
        recursive.concrete_type_store = recursive.ConcreteTypeStore()
        try:
            yield
        finally:
            state._python_cu, recursive._python_cu, recursive.concrete_type_store = before
