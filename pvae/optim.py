"""One torch optimizer over all parameters, for stock SVI."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pvae import processes


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups of parameters for `torch.optim.AdamW`: one decays, the other does not.

    Parameters with two dimensions or more (the weights of layers) decay; biases and scales do not.
    Source: Decoupled Weight Decay Regularization (2017), arXiv:1711.05101.

    >>> [len(group["params"]) for group in decay_groups(nn.Linear(2, 3), 0.01)]
    [1, 1]
    """
    weights = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


class NotFinite(ArithmeticError):
    """A number that must be finite is not; `parameters` are those whose gradient is not."""

    def __init__(self, message: str, parameters: Sequence[Tensor] = ()) -> None:
        super().__init__(message)
        self.parameters = parameters


class SingleOptimizer(PyroOptim):
    """Lets stock SVI step one torch optimizer over all parameters at once.

    `PyroOptim` builds one torch optimizer for each parameter, which is slow, gains nothing from
    fused kernels, and keys its state by store names. The wrapped optimizer stays a torch optimizer:
    its `param_groups`, schedulers and `state_dict` work as usual. If there are several processes
    (`pvae.processes`), their gradients are summed before the step.

    A step whose gradients are not all finite is never taken, and does not change the moments.

    Args:
        optimizer: a torch optimizer that holds all parameters.
        clip_norm: the largest norm of all gradients together; larger ones are scaled down to it.
        on_nan: what to do about gradients that are not finite: "stop" raises, "skip" leaves the
            step out and counts it in `left_out`. A fused optimizer on a GPU counts in both cases
            and does not raise, because to read a number from a GPU is to wait for the GPU.

    Raises:
        ValueError: an argument is out of its range; or SVI found a parameter that the optimizer
            does not hold, and that would never train.
        NotFinite: a gradient is not finite, and `on_nan` is "stop".

    >>> import pyro, pvae
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> adam = torch.optim.Adam(vae.parameters(), lr=1e-3)
    >>> svi = SVI(vae.model, vae.guide, SingleOptimizer(adam), Trace_ELBO())
    >>> svi.step(torch.ones(4, 1, 8, 8)) > 0
    True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        on_nan: str = "stop",
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, not {clip_norm}")
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan must be one of stop, skip, not {on_nan!r}")
        super().__init__(type(optimizer), {})
        self.optimizer, self.clip_norm, self.on_nan = optimizer, clip_norm, on_nan
        self.left_out: int | Tensor = 0  # a number of steps; on a GPU, a tensor there
        # a dictionary keeps the order, which must be the same in all processes
        self._held = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
        self._sums: dict[Tensor, Tensor] | None = None

    def __call__(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        unknown = [p for p in params if p not in self._held]
        if unknown:
            raise ValueError(
                f"SVI found {len(unknown)} parameter(s) that the optimizer does not hold "
                f"(shapes {[tuple(p.shape) for p in unknown[:3]]}): construct it over all of them"
            )
        if self._sums is not None:
            self._add(params)
            return
        # the sum gives this process gradients that only others have: remove them after the step
        trained, own = self._trained(), set(params)
        foreign = {p: p.grad for p in trained if p not in own}
        # the order: sum over processes, test for finite values, clip, step
        processes.sum_gradients(trained)
        self._step(trained)
        for p, gradient in foreign.items():
            p.grad = gradient

    def _step(self, trained: list[Tensor]) -> None:
        for p in trained:
            # torch's fused kernels pair the elements of weight and gradient by their order in
            # memory, and are silently wrong if one is channels_last and the other is not
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        if norm.is_cuda and all(group.get("fused") for group in self.optimizer.param_groups):
            self._leave_out_on_gpu(norm)
        elif not math.isfinite(norm):
            self._leave_out(trained)
            return
        if self.clip_norm is not None:
            clip_grads_with_norm_(trained, self.clip_norm, norm)
        self.optimizer.step()

    def _leave_out(self, params: list[Tensor]) -> None:
        if self.on_nan == "stop":
            bad = [p for p in params if p.grad is not None and not p.grad.isfinite().all()]
            raise NotFinite("a gradient is not finite", bad)
        self.left_out += 1

    def _leave_out_on_gpu(self, norm: Tensor) -> None:
        """Tells torch's fused kernel to leave the step out, as a `GradScaler` does."""
        found = (~norm.isfinite()).float()
        if not isinstance(self.left_out, Tensor):
            self.left_out = torch.tensor(float(self.left_out), device=norm.device)
        self.left_out += found  # in place: a recorded step adds to the same tensor
        self.optimizer.found_inf = found  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """Sums the gradients of SVI's steps inside the block; steps the optimizer once at its end.

        The optimizer steps even if SVI took no step inside: a process may have no image of a small
        last batch, but it must take part in the sum over processes.
        """
        sums = self._sums = {}
        try:
            yield
        finally:
            self._sums = None
        trained = self._trained()
        left = {p: p.grad for p in trained}  # the zeros that SVI leaves
        for p in trained:
            p.grad = sums.get(p)
        try:
            self(trained)
        finally:
            for p, gradient in left.items():
                p.grad = gradient

    def _trained(self) -> list[Tensor]:
        return [p for p in self._held if p.requires_grad]

    def _add(self, params: Iterable[Tensor]) -> None:
        assert self._sums is not None
        for p in params:
            if p.grad is not None:
                self._sums[p] = p.grad if p not in self._sums else self._sums[p] + p.grad
