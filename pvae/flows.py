r"""Normalizing flows, as heads of posteriors and as priors, from Pyro's own transforms.

`z = f(e)`, `e ~ N(0, I)`, `log q(z) = log N(e; 0, I) - log |det df/de|`. The modules keep the
networks, and make the transforms anew at each call: a transform caches the tensors of its last
call, and with those in it a module could be neither copied nor pickled.
"""

from collections.abc import Callable
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform

from pvae.kinds import Shape

_BINS, _BOUND = 8, 4.0  # of the splines, which are the identity beyond the bound


class _Network:
    """An autoregressive network as Pyro's transforms take it.

    Their inverse starts from float32 zeros, so the input is cast to the network's dtype. It follows
    `permutation`, which is a list here: a tensor could not be traced.
    """

    def __init__(self, net: nn.Module, order: list[int], given: tuple[Tensor, ...]) -> None:
        self.net, self.permutation, self.given = net, order, given
        self.dtype = next(net.parameters()).dtype

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x.to(self.dtype), *self.given)


# an autoregressive transform: the sizes of its parameters for each element, and what makes it of a
# dimension and a network
Kind = tuple[list[int], Callable[[int, _Network], Transform]]


def _affine(dim: int, net: _Network) -> Transform:
    return T.AffineAutoregressive(net, stable=True)  # z = s e + (1 - s) m: starts near the identity


def _spline(dim: int, net: _Network) -> Transform:
    return T.SplineAutoregressive(dim, net, count_bins=_BINS, bound=_BOUND, order="linear")


AFFINE: Kind = ([1, 1], _affine)
SPLINE: Kind = ([_BINS, _BINS, _BINS - 1, _BINS], _spline)


class _Flow(nn.Module):
    """Base of the flows: an autoregressive network for each transform.

    `make` is Pyro's class of such networks with its first arguments, the sizes of its inputs.
    """

    def __init__(
        self, dim: int, make: Callable[..., nn.Module], kind: Kind, transforms: int, hidden: int
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(
                f"an autoregressive flow needs a latent of at least 2 dimensions, not {dim}"
            )
        self.dim = dim
        sizes, self._transform = kind
        up = list(range(dim))
        self._orders = [up if i % 2 == 0 else up[::-1] for i in range(transforms)]
        self.nets = nn.ModuleList(
            make(
                [max(hidden, dim)],
                sizes,
                permutation=torch.LongTensor(order),
                # tanh: with unbounded scales a draw, D divisions one after another, may overflow
                nonlinearity=nn.Tanh(),
            )
            for order in self._orders
        )

    def _transforms(self, *given: Tensor) -> list[Transform]:
        """The transforms of this call, their networks given the context where there is one."""
        return [
            self._transform(self.dim, _Network(net, order, given))
            for net, order in zip(self.nets, self._orders, strict=True)
        ]


class FlowPosterior(_Flow):
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
        event_shape: Shape,
        *,
        kind: Kind = AFFINE,
        transforms: int = 2,
        context: int = 16,
        hidden: int = 32,
    ) -> None:
        if len(event_shape) != 1:
            raise ValueError(f"event_shape must be (D,) for a flow, not {tuple(event_shape)}")
        make = partial(ConditionalAutoRegressiveNN, event_shape[0], context)
        super().__init__(event_shape[0], make, kind, transforms, hidden)
        self.context = context
        self.param_shape = torch.Size((2 * self.dim + context,))

    def forward(self, h: Tensor) -> dist.Distribution:
        loc, log_variance, context = h.split([self.dim, self.dim, self.context], dim=-1)
        # cached like the others, so that a draw's density needs no inverse
        scale = (log_variance / 2).exp()
        shift = T.AffineTransform(loc, scale, event_dim=1, cache_size=1)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(noise, [*self._transforms(context), shift])


class FlowPrior(_Flow):
    r"""A prior `p(z)`: a masked autoregressive flow. A density takes one pass, a draw `D` passes.

    `e = g(z) ~ N(0, I)`, `log p(z) = log N(g(z); 0, I) + log |det dg/dz|`; labels are ignored.
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
        super().__init__(
            latent_dim, partial(AutoRegressiveNN, latent_dim), kind, transforms, hidden
        )
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        transforms = [transform.inv for transform in self._transforms()]
        noise = dist.Normal(self.loc, self.scale).to_event(1)
        return dist.TransformedDistribution(noise, transforms)
