"""One torch optimizer over all parameters, for stock SVI."""

from collections.abc import Iterable

import torch
from pyro.optim import PyroOptim
from torch import Tensor


class SingleOptimizer(PyroOptim):
    """Lets stock SVI step one torch optimizer over all parameters at once.

    `PyroOptim` builds one torch optimizer for each parameter, which is slow, gains nothing from
    fused kernels, and keys its state by store names. The wrapped optimizer stays yours: its
    `param_groups`, schedulers and `state_dict` are torch's own.

    Raises:
        ValueError: SVI found a parameter that the optimizer does not hold; it would never train.

    >>> import pyro, pvae
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> adam = torch.optim.Adam(vae.parameters(), lr=1e-3)
    >>> svi = SVI(vae.model, vae.guide, SingleOptimizer(adam), Trace_ELBO())
    >>> svi.step(torch.ones(4, 1, 8, 8)) > 0
    True
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer
        self._held = {p for group in optimizer.param_groups for p in group["params"]}

    def __call__(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        unknown = [p for p in params if p not in self._held]
        if unknown:
            raise ValueError(
                f"SVI found {len(unknown)} parameter(s) that the optimizer does not hold "
                f"(shapes {[tuple(p.shape) for p in unknown[:3]]}): construct it over all of them"
            )
        for p in params:
            # torch's fused kernels pair the elements of weight and gradient by their order in
            # memory, and are silently wrong where one is channels_last and the other is not
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        self.optimizer.step()
