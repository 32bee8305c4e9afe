"""A whole training step, from the loss to the optimizer, as one recording that a GPU replays.

A step of a small net is shorter than what the host needs to launch its kernels one by one; a CUDA
graph launches all of them at once. What a replay reads and writes lies at fixed addresses: the
arguments and the learning rates are copied there first, the losses are found there after.
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
    """Records `step` without running it: what replays it, and the tensors that a replay fills.

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
    """Inside, the optimizer reads its learning rates from tensors and never asks the host."""
    before = [(group["lr"], group["capturable"]) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"], group["capturable"] = rate, True
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(groups, before, strict=True):
            group["lr"], group["capturable"] = rate, capturable


def _like(t: Tensor) -> Tensor:
    """A tensor of its own with the values and the strides of `t`."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


class Recording:
    """A step recorded at these arguments, and what has to hold for it to be that step still.

    Args:
        step: from arguments to losses, the update of the parameters among it.
        arguments: tensors like those of every step to come.
        tensors: whatever else the step reads or writes, the parameters first.
        optimizer: a fused torch optimizer. Its learning rates may change from step to step; all
            other settings, and where its state lies, must stay what they are.
        record: `cuda_graph`.

    Raises:
        NotCaptured: arguments and tensors lie on several devices, or not where `record` asks for.
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
                f"a recorded step lies on one device, not on {sorted(map(str, devices))}"
            )
        (device,) = devices
        self.arguments = [_like(t) for t in arguments]
        groups = optimizer.param_groups
        self.rates = [torch.tensor(float(group["lr"]), device=device) for group in groups]
        self.made_for = _key(tensors, optimizer)
        with _recordable(groups, self.rates):
            self.replay, self.losses = record(lambda: step(self.arguments), device)

    def fits(self, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step on these tensors is the recorded one."""
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
    """Where everything is, and the optimizer's settings."""
    moments = [v for p in tensors for v in optimizer.state.get(p, {}).values()]
    addresses = [t.data_ptr() for t in (*tensors, *moments) if isinstance(t, Tensor)]
    settings = [
        (name, value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name not in ("params", "lr", "capturable")
    ]
    return id(optimizer), tuple(addresses), tuple(settings)
