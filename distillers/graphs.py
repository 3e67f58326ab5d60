"""Functions of tensors as CUDA graphs, for kernels so small that launching each takes longer than running it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replayed:
    """A function of tensors, captured once and replayed. Side effects, such as weight updates, recur with each replay.

    Inputs must keep their shapes, everything that is read or written must keep its address, and the function must not
    wait for the GPU (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *inputs: Tensor,
        pool: Any = None,
        warmed: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            function: called four times here on the inputs: three times to warm up, then for the capture.
            inputs: on the GPU.
            pool: memory pool to share with other graphs (``torch.cuda.graph_pool_handle()``) whose results none of them
                needs later; a private one when left out.
            warmed: called after the warm-up calls, which really compute, and before the capture.
        """
        self._inputs = [each.clone() for each in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # lazy compilation, autotuning and allocation must happen before the capture
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        if warmed is not None:
            warmed()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the function's value for these inputs. The next replay overwrites it, so copy what you keep."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output
