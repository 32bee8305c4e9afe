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

Group = dict[str, Any]  # of a torch optimizer
Recorder = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], Any], list[Tensor]]]


def cuda_graph(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], Any], list[Tensor]]:
    """Records `step` without running it: what replays it, and the tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


class Recording:
    """A step recorded at these arguments, and what has to hold for it to be that step still.

    Args:
        step: from arguments to losses, the update of the parameters among it.
        arguments: tensors like those of every step to come.
        tensors: whatever else the step reads or writes; they must stay where they are.
        optimizer: a fused torch optimizer. Its learning rates may change from step to step; all
            other settings, and the tensors of its state, must stay what they are.
        record: `cuda_graph`.
    """

    def __init__(
        self,
        step: Callable[[list[Tensor]], list[Tensor]],
        arguments: Sequence[Tensor],
        tensors: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        record: Recorder,
    ) -> None:
        self.arguments = [t.clone() for t in arguments]
        self.tensors, self.optimizer = list(tensors), optimizer
        groups = optimizer.param_groups
        self.rates = [torch.tensor(float(g["lr"]), device=self._device()) for g in groups]
        self.made_for = self._key()
        with _recordable(groups, self.rates):
            self.replay, self.losses = record(lambda: step(self.arguments))

    def fits(self) -> bool:
        return self._key() == self.made_for

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        for own, given in zip(self.arguments, arguments, strict=True):
            own.copy_(given, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(float(group["lr"]))
        self.replay()
        return [loss.clone() for loss in self.losses]  # the next replay writes over them

    def _device(self) -> torch.device:
        return self.tensors[0].device

    def _key(self) -> Hashable:
        """Where everything is, and the optimizer's settings."""
        state = self.optimizer.state
        moments = [v for p in self.tensors for v in state.get(p, {}).values()]
        addresses = [t.data_ptr() for t in (*self.tensors, *moments) if isinstance(t, Tensor)]
        settings = [
            (name, value)
            for group in self.optimizer.param_groups
            for name, value in group.items()
            if name not in ("params", "lr", "capturable")
        ]
        return tuple(addresses), tuple(settings)
