r"""The Pyro programs of a VAE with one latent: the model `p(z) p(x|z)` and the guide `q(z|x)`.

Both are plain Pyro: stock `SVI`, `Predictive`, `ELBOModule`, `RenyiELBO` and `poutine.trace` work
on them. The sites are `z` and `x`, the plate is `data`.
"""

import itertools
import weakref
from typing import Any

import pyro
from pyro.distributions import constraints
from torch import Tensor, nn

_numbers = itertools.count()


def _leave_store(prefix: str) -> None:
    store = pyro.get_param_store()
    for name in [name for name in store if name.startswith(prefix)]:
        # Pyro maps a parameter back to one name, and fails to delete another: but two programs
        # that share a module give it one each
        value: Any = store[name]
        parameter = value.unconstrained()
        store.set_state({"params": {name: parameter}, "constraints": {name: constraints.real}})
        del store[name]
        for other, value in store.items():
            if value.unconstrained() is parameter:
                store.set_state(
                    {"params": {other: parameter}, "constraints": {other: constraints.real}}
                )


class Program(nn.Module):
    """An `nn.Module` that keeps its parameters in Pyro's store under a name of its own.

    Pyro's store is global and finds parameters by name, so the name belongs to the *object*: a
    second VAE, a deep copy and an unpickled one draw their own, and the names leave the store
    with the object. Save a `state_dict`, never the store.
    """

    _unique_name: str

    def __init__(self) -> None:
        super().__init__()
        self._draw_name()

    def _draw_name(self) -> None:
        self._unique_name = f"pvae.{type(self).__name__}-{next(_numbers)}"
        leave = weakref.finalize(self, _leave_store, self._unique_name + "$$$")
        leave.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        # Pyro leaves a weak reference on each parameter, which cannot be pickled
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._draw_name()

    def register(self) -> None:
        """Makes the parameters known to the Pyro handlers around this call."""
        store = pyro.get_param_store()
        for path, parameter in self.named_parameters():
            name = f"{self._unique_name}$$${path}"  # pyro.module's own naming
            if parameter.requires_grad and name not in store:
                # pyro.param would store a contiguous copy of a channels_last weight, and train
                # that copy; set_state keeps the very parameter
                store.set_state(
                    {"params": {name: parameter}, "constraints": {name: constraints.real}}
                )
        pyro.module(self._unique_name, self)


def _labels(y: Tensor | None) -> tuple[Tensor, ...]:
    """Labels as trailing arguments: none where there are none, so `nn.Sequential` is welcome."""
    return () if y is None else (y,)


def _check_images(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}; the programs take floating point data (images in [0, 1]): "
            "see pvae.data.pixels"
        )
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a batch (B, C, H, W) with B >= 1 is needed"
        )


class Model(Program):
    r"""The generative program `p(z | y) p(x | z, y)`.

    Args:
        prior: a module with `prior()` or `prior(y)`, a distribution over `z`.
        likelihood: a module with `likelihood(z)` or `likelihood(z, y)`, a distribution over `x`.

    Call it with `x` of shape `(B, C, H, W)` to condition on data, or with `size` to generate.
    Raises `ValueError` where `x` is not floating point, empty, or not of the likelihood's shape.
    Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114.

    >>> from pvae.heads import NormalFixedScale
    >>> from pvae.priors import StandardNormal
    >>> model = Model(StandardNormal(2), nn.Sequential(nn.Linear(2, 5), NormalFixedScale((5,))))
    >>> model(size=3).shape
    torch.Size([3, 5])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        size: int = 1,
    ) -> Tensor:
        """Samples `z` and `x` (or scores the given `x`) and returns `x`; `index` is the guide's."""
        self.register()
        if x is not None:
            _check_images(x)
            size = len(x)
        elif y is not None:
            size = len(y)
        with pyro.plate("data", size):
            z = pyro.sample("z", self.prior(*_labels(y)))
            p = self.likelihood(z, *_labels(y))
            if x is not None and x.shape[1:] != p.event_shape:
                raise ValueError(
                    f"x holds images of shape {tuple(x.shape[1:])}, "
                    f"but the likelihood is over {tuple(p.event_shape)}"
                )
            return pyro.sample("x", p, obs=x)


class Guide(Program):
    r"""The amortized posterior `q(z | x, y)`, or `q(z | index)` with one factor for each datum.

    Args:
        posterior: a module with `posterior(x)` or `posterior(x, y)`, a distribution over `z`.

    >>> import torch
    >>> from pvae.heads import Normal
    >>> guide = Guide(nn.Sequential(nn.Linear(5, 4), Normal((2,))))
    >>> guide(torch.zeros(3, 5)).shape
    torch.Size([3, 2])
    """

    def __init__(self, posterior: nn.Module) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        size: int = 1,
    ) -> Tensor:
        """Samples `z` given `x` `(B, C, H, W)`, or given the data's `index` `(B,)`; returns `z`."""
        self.register()
        given = x if index is None else index
        if given is None:
            raise ValueError("x is missing: the guide is a posterior given data")
        if index is None:
            _check_images(given)
        with pyro.plate("data", len(given)):
            return pyro.sample("z", self.posterior(given, *_labels(y)))
