"""Functions of tensors as CUDA graphs: started as one, where their kernels are so small that starting each takes longer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replayed:
    """A function of tensors, captured once and replayed: whatever it changes, such as weights, each replay changes again.

    Its inputs must keep their shapes, all it reads and writes must stay where it lies, and it must not wait for the GPU
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
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
            function: run four times here on the inputs, the last time to capture it.
            inputs: on the GPU.
            pool: memory to share with other graphs (``torch.cuda.graph_pool_handle()``), where none of them needs what
                another has left there; its own when left out.
            warmed: called before the capture, after the runs that really compute.
        """
        self._inputs = [each.clone() for each in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is compiled, chosen or allocated at first must be before it is captured
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        if warmed is not None:
            warmed()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives for these; lies where the next replay's will, so take a copy of what is to last."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output
