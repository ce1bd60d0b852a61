"""What can run a traced step: PyTorch operation by operation, Inductor's kernels, a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pmm_fast.meta.network import copy_tensors

# a step of tensors; the list is not changed, and the results are new
Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# runs before a capture: libraries choose their kernels and allocate their workspaces then
WARM_UP = 3


def run_graph(graph: GraphModule, values: Sequence[Tensor], earlier: Sequence[Compiled]) -> Compiled:
    """The traced operations one after the other; each intermediate is freed after its last use."""
    return lambda inputs: graph(*inputs)


def inductor(graph: GraphModule, values: Sequence[Tensor], earlier: Sequence[Compiled]) -> Compiled:
    """Inductor's fused kernels for static shapes; its cache on disk makes a second run quick."""
    # the cache takes no graph without a shape environment, even where no shape is symbolic
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    fakes: list[Any] = [mode.from_tensor(value, static_shapes=True) for value in values]
    with torch.no_grad(), tracing(TracingContext(mode)):
        compiled = torch._inductor.compile(graph, fakes, {"fx_graph_cache": True})
    return lambda inputs: compiled(*inputs)


class CudaGraph:
    """A step captured once and replayed with new values in the same places.

    A replay launches everything at once, so the processor's time per operation is gone.  Inputs are copied in, results
    are copied out, and everything between lives in memory set aside for it, which all layouts of a step share: they run
    one after another on one stream, and what one leaves there is copied out before the next runs.

    Args:
        graph: the traced step.
        values: its inputs, all on one CUDA device.
        earlier: what was made for other layouts of the same step, on the same device.

    Raises:
        RuntimeError: tensors on another device, or an operation that cannot be captured.
    """

    def __init__(self, graph: GraphModule, values: Sequence[Tensor], earlier: Sequence[Compiled]) -> None:
        device = values[0].device
        if device.type != "cuda":
            raise RuntimeError(f"engine 'cuda-graph' needs tensors on a CUDA device, got {device}")
        self._inputs = [value.clone() for value in values]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.no_grad():
            # what eager mode has let go of would not be given to another stream
            torch.cuda.empty_cache()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    graph(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            pool = next((other._graph.pool() for other in earlier if isinstance(other, CudaGraph)), None)
            # "thread_local": this thread alone launches what is captured, there is no autograd in it; by default the
            # thread of a data loader that pins its memory meanwhile would end the capture, and itself
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._outputs = graph(*self._inputs)

    def __call__(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The step of new values."""
        copy_tensors(self._inputs, values)
        self._graph.replay()
        found = [torch.empty_like(output) for output in self._outputs]
        copy_tensors(found, self._outputs)
        return found


# made of the traced step, its inputs, and what was made for other layouts of the same step
ENGINES: dict[str, Callable[[GraphModule, Sequence[Tensor], Sequence[Compiled]], Compiled]] = {
    "graph": run_graph,
    "inductor": inductor,
    "cuda-graph": CudaGraph,
}


def cache_folder() -> str:
    """Where Inductor keeps what it compiled (``TORCHINDUCTOR_CACHE_DIR``)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
