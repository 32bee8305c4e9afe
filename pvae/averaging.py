"""A moving average of a pair's weights, often with a better validation loss than the weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    r"""The exponential moving average (EMA) of a module's floating-point parameters and buffers.

    After step `t = 1, 2, ...` the average `a` of the weights `w` is `a <- d a + (1 - d) w`, with
    `d = min(decay, t / (t + 9))`, so that it soon forgets the first steps.
    Source: Averaging Weights Leads to Wider Optima and Better Generalization (2018),
    arXiv:1803.05407; the average itself is torch's, `torch.optim.swa_utils`.

    Args:
        module: the module whose weights are averaged.
        decay: at least 0 and below 1; 0.999 averages over about the last 1,000 steps.

    Raises:
        ValueError: `decay` is out of its range.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(net.weight)
    >>> average = Average(net, 0.5)
    >>> _ = nn.init.ones_(net.weight)
    >>> for step in (0, 1, 2):
    ...     average.update(step)
    >>> with average.in_place():
    ...     round(net.weight.item(), 4)
    0.9955
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be a decay of at least 0 and below 1, not {decay}")
        self.decay = decay
        # a tensor that two parts share has two names there, and is averaged once
        names = {t: name for name, t in module.state_dict(keep_vars=True).items()}
        self._held = {name: t for t, name in names.items() if t.is_floating_point()}
        self._values = {name: t.detach().clone() for name, t in self._held.items()}

    def update(self, step: int) -> None:
        """Adds the weights after step number `step`, counted from 0, to the average."""
        average = get_ema_multi_avg_fn(min(self.decay, (step + 1) / (step + 10)))
        held = [t.detach() for t in self._held.values()]
        average(list(self._values.values()), held, step + 1)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the module the averaged weights inside the block, and its own weights after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, held in self._held.items():
            own = held.clone()
            held.copy_(self._values[name])
            self._values[name].copy_(own)

    def state(self) -> dict[str, Tensor]:
        """Returns the averaged weights by name, not copied."""
        return dict(self._values)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Takes over the averaged weights of a checkpoint, the `state()` of another average.

        Raises:
            KeyError, RuntimeError: the names or shapes in `state` are others.
        """
        for name, value in self._values.items():
            value.copy_(state[name])
