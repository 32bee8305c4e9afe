"""Records a whole training step, from the loss to the optimizer, so that a GPU can replay it.

To launch the kernels of a small net one by one takes the host longer than the GPU runs them; a
CUDA graph launches all of them at once. A replay reads and writes at fixed addresses: arguments and
learning rates are copied there before it, and the losses are there after it.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.captured.compiling import NotCaptured

Group = dict[str, Any]  # of a torch optimizer
Step = Callable[[], list[Tensor]]
Recorder = Callable[[Step, torch.device], tuple[Callable[[], Any], list[Tensor]]]


def cuda_graph(step: Step, device: torch.device) -> tuple[Callable[[], Any], list[Tensor]]:
    """Records `step` without running it; returns a function that replays it, and its results.

    Raises:
        NotCaptured: the step does not run on a GPU.
    """
    if device.type != "cuda":
        raise NotCaptured(f"a CUDA graph takes a pair and arguments on a GPU, not on {device}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


@contextlib.contextmanager
def _recordable(groups: Sequence[Group], rates: Sequence[Tensor]) -> Iterator[None]:
    """Lets the optimizer read learning rates from tensors on the device, inside the block."""
    before = [(group["lr"], group["capturable"]) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable


def _like(t: Tensor) -> Tensor:
    """Returns a new tensor with the values and the strides of `t`."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


class Recording:
    """A recorded step. Only a step that `fits` may be replayed.

    Args:
        step: a function from arguments to losses, which also updates the parameters.
        arguments: tensors with the shapes and dtypes of the arguments of all later steps.
        tensors: all other tensors that the step reads or writes, the parameters first.
        optimizer: a fused torch optimizer. Its learning rates may change from step to step; its
            other settings, and the addresses of its state, must stay the same.
        record: `cuda_graph`.

    Raises:
        NotCaptured: the tensors are on several devices, or on a device that `record` cannot use.
    """

    def __init__(
        self,
        step: Callable[[list[Tensor]], list[Tensor]],
        arguments: Sequence[Tensor],
        tensors: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        record: Recorder,
    ) -> None:
        devices = {t.device for t in (*arguments, *tensors)}
        if len(devices) > 1:
            raise NotCaptured(
                f"a recorded step runs on one device, not on {sorted(map(str, devices))}"
            )
        (device,) = devices
        self.arguments = [_like(t) for t in arguments]
        groups = optimizer.param_groups
        self.rates = [torch.tensor(float(group["lr"]), device=device) for group in groups]
        self.made_for = _key(tensors, optimizer)
        with _recordable(groups, self.rates):
            self.replay, self.losses = record(lambda: step(self.arguments), device)

    def fits(self, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether a step on these tensors is the recorded one."""
        return _key(tensors, optimizer) == self.made_for

    def __call__(
        self, arguments: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> list[Tensor]:
        for own, given in zip(self.arguments, arguments, strict=True):
            own.copy_(given, non_blocking=True)
        for rate, group in zip(self.rates, optimizer.param_groups, strict=True):
            rate.fill_(float(group["lr"]))
        self.replay()
        return [loss.clone() for loss in self.losses]  # the next replay writes over them


def _key(tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Hashable:
    """Returns the addresses of all tensors, and the optimizer's settings but its rates."""
    moments = [v for p in tensors for v in optimizer.state.get(p, {}).values()]
    addresses = [t.data_ptr() for t in (*tensors, *moments) if isinstance(t, Tensor)]
    settings = [
        (name, value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name not in ("params", "lr", "capturable")
    ]
    return id(optimizer), tuple(addresses), tuple(settings)
