r"""Normalizing flows, as heads of posteriors and as priors, from Pyro's own transforms.

`z = f(e)`, `e ~ N(0, I)`, `log q(z) = log N(e; 0, I) - log |det df/de|`. The networks are kept
here, the transforms are made anew at each call: a transform caches tensors of its last call, which
could be neither copied nor pickled.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn

_BINS, _BOUND = 8, 4.0  # of the splines, which are the identity beyond the bound

# an autoregressive transform: how many parameters an element, and the transform of its network
Kind = tuple[list[int], Callable[[int, Any], Any]]


def _affine(dim: int, net: Any) -> Any:
    return T.AffineAutoregressive(net, stable=True)  # z = s e + (1 - s) m: starts near the identity


def _spline(dim: int, net: Any) -> Any:
    return T.SplineAutoregressive(dim, net, count_bins=_BINS, bound=_BOUND, order="linear")


AFFINE: Kind = ([1, 1], _affine)
SPLINE: Kind = ([_BINS, _BINS, _BINS - 1, _BINS], _spline)


def _check_dim(dim: int) -> int:
    if dim < 2:
        raise ValueError(
            f"an autoregressive flow needs a latent of at least 2 dimensions, not {dim}"
        )
    return dim


class _Network:
    """What Pyro's transforms ask of an autoregressive network. Their inverse starts from float32
    zeros whatever the network is in, and goes by an `order` that can be traced if it is no tensor.
    """

    def __init__(self, net: nn.Module, order: list[int], context: Tensor | None = None) -> None:
        self.net, self.permutation = net, order
        self.given = () if context is None else (context,)
        self.dtype = next(net.parameters()).dtype

    def __call__(self, x: Tensor) -> Any:
        return self.net(x.to(self.dtype), *self.given)


def _order(dim: int, i: int) -> list[int]:
    """Every second transform takes the dimensions from behind."""
    return list(range(dim)) if i % 2 == 0 else list(range(dim - 1, -1, -1))


class FlowPosterior(nn.Module):
    r"""A head: an autoregressive flow conditioned on `x`, `z = loc + scale f(e; h)`, `e ~ N(0, I)`.

    The raw parameters of one event are loc, log-variance and the context `h` that each transform's
    network takes, `(2 D + context,)`. Drawing, and the density of a draw just made, take one pass;
    with `AFFINE` transforms it is the inverse autoregressive flow, with `SPLINE` ones a neural
    spline flow. The density at any other point takes `D` passes.
    Sources: Improved Variational Inference with Inverse Autoregressive Flow (2016),
    arXiv:1606.04934; Neural Spline Flows (2019), arXiv:1906.04032.

    Args:
        event_shape: `(D,)`, `D` at least 2.
        kind: `AFFINE` or `SPLINE`.
        transforms: how many of them.
        context: width of `h`.
        hidden: width of each transform's network.

    Raises:
        ValueError: `event_shape` is not `(D,)` with `D >= 2`.

    >>> head = FlowPosterior((2,), context=3)
    >>> q = head(torch.zeros(5, 7))
    >>> q.batch_shape, q.event_shape
    (torch.Size([5]), torch.Size([2]))
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        kind: Kind = AFFINE,
        transforms: int = 2,
        context: int = 16,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        if len(event_shape) != 1:
            raise ValueError(f"event_shape must be (D,) for a flow, not {tuple(event_shape)}")
        self.dim, self.context = _check_dim(event_shape[0]), context
        self.param_shape = torch.Size((2 * self.dim + context,))
        sizes, self._transform = kind
        self._orders = [_order(self.dim, i) for i in range(transforms)]
        self.nets = nn.ModuleList(
            ConditionalAutoRegressiveNN(
                self.dim,
                context,
                [max(hidden, self.dim)],
                sizes,
                permutation=torch.LongTensor(order),
                nonlinearity=nn.Tanh(),
            )
            for order in self._orders
        )

    def forward(self, h: Tensor) -> dist.Distribution:
        loc, log_variance, context = h.split([self.dim, self.dim, self.context], dim=-1)
        transforms = [
            self._transform(self.dim, _Network(net, order, context))
            for net, order in zip(self.nets, self._orders, strict=True)
        ]
        # cached like the others, so that a draw's density needs no inverse
        scale = (log_variance / 2).exp()
        transforms.append(T.AffineTransform(loc, scale, event_dim=1, cache_size=1))
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(noise, transforms)


class FlowPrior(nn.Module):
    r"""A prior `p(z)`: a masked autoregressive flow, whose density takes one pass and a draw `D`.

    `e = g(z) ~ N(0, I)`, `log p(z) = log N(g(z); 0, I) + log |det dg/dz|`; it takes no notice of
    labels.
    Sources: Masked Autoregressive Flow for Density Estimation (2017), arXiv:1705.07057; Variational
    Lossy Autoencoder (2016), arXiv:1611.02731.

    Args:
        latent_dim: `D`, at least 2.
        kind: `AFFINE` or `SPLINE`.
        transforms: how many of them.
        hidden: width of each transform's network.

    Raises:
        ValueError: `latent_dim` is below 2.

    >>> FlowPrior(3)().sample((5,)).shape
    torch.Size([5, 3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, latent_dim: int, *, kind: Kind = AFFINE, transforms: int = 2, hidden: int = 32
    ) -> None:
        super().__init__()
        self.dim = _check_dim(latent_dim)
        sizes, self._transform = kind
        self._orders = [_order(self.dim, i) for i in range(transforms)]
        self.nets = nn.ModuleList(
            # tanh: with unbounded scales a draw, D divisions one after another, may overflow
            AutoRegressiveNN(
                latent_dim,
                [max(hidden, latent_dim)],
                sizes,
                permutation=torch.LongTensor(order),
                nonlinearity=nn.Tanh(),
            )
            for order in self._orders
        )
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        transforms = [
            self._transform(self.dim, _Network(net, order)).inv
            for net, order in zip(self.nets, self._orders, strict=True)
        ]
        return dist.TransformedDistribution(
            dist.Normal(self.loc, self.scale).to_event(1), transforms
        )
