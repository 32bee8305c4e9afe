r"""Normalizing flows, as heads of posteriors and as priors, from Pyro's own transforms.

`z = f(e)`, `e ~ N(0, I)`, `log q(z) = log N(e; 0, I) - log |det df/de|`. Each module keeps its
networks and makes new transforms at each call: a transform caches the tensors of its last call, and
a module that keeps such a transform could be neither copied nor pickled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform

from pvae.kinds import Shape

_BINS, _BOUND = 8, 4.0  # of the splines, which are the identity beyond the bound


class _Network:
    """An autoregressive network in the form that Pyro's transforms take.

    The inverse of a transform starts from float32 zeros, so the input is cast to the network's
    dtype. The inverse goes in the order of `permutation`, a list: a tensor could not be traced.
    """

    def __init__(self, net: nn.Module, order: list[int], given: tuple[Tensor, ...]) -> None:
        self.net, self.permutation, self.given = net, order, given
        self.dtype = next(net.parameters()).dtype

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x.to(self.dtype), *self.given)


# a kind of autoregressive transform: the sizes of its parameters for each element, and the function
# that makes it from a dimension and a network
Kind = tuple[list[int], Callable[[int, _Network], Transform]]


def _affine(dim: int, net: _Network) -> Transform:
    return T.AffineAutoregressive(net, stable=True)  # z = s e + (1 - s) m: starts near the identity


def _spline(dim: int, net: _Network) -> Transform:
    return T.SplineAutoregressive(dim, net, count_bins=_BINS, bound=_BOUND, order="linear")


AFFINE: Kind = ([1, 1], _affine)
SPLINE: Kind = ([_BINS, _BINS, _BINS - 1, _BINS], _spline)


def _check_dim(dim: int) -> None:
    if dim < 2:
        raise ValueError(f"a flow needs a latent of at least 2 dimensions, not {dim}")


class _Noise(nn.Module):
    """`N(0, I)` over `(D,)`. Buffers follow the module; these are constant, and are not saved."""

    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim), persistent=False)
        self.register_buffer("scale", torch.ones(dim), persistent=False)

    def forward(self) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class _Flow(nn.Module):
    """Base of the autoregressive flows: one network for each transform.

    `make` is Pyro's class of autoregressive networks, with the sizes of its inputs already given.
    """

    def __init__(
        self, dim: int, make: Callable[..., nn.Module], kind: Kind, transforms: int, hidden: int
    ) -> None:
        super().__init__()
        _check_dim(dim)
        self.dim = dim
        sizes, self._transform = kind
        up = list(range(dim))
        self._orders = [up if i % 2 == 0 else up[::-1] for i in range(transforms)]
        self.nets = nn.ModuleList(
            make(
                [max(hidden, dim)],
                sizes,
                permutation=torch.LongTensor(order),
                # tanh bounds the scales: a draw divides D times in a row, and could overflow
                nonlinearity=nn.Tanh(),
            )
            for order in self._orders
        )

    def _transforms(self, *given: Tensor) -> list[Transform]:
        """Makes the transforms of one call; `given` holds the context of a conditional flow."""
        return [
            self._transform(self.dim, _Network(net, order, given))
            for net, order in zip(self.nets, self._orders, strict=True)
        ]


class FlowPosterior(_Flow):
    r"""A head: an autoregressive flow conditioned on `x`, `z = loc + scale f(e; h)`, `e ~ N(0, I)`.

    The raw parameters of one event are loc, log-variance and the context `h` that each transform's
    network takes, `(2 D + context,)`. A draw and its own density take one pass together; the
    density at any other point takes `D` passes. With `AFFINE` transforms this is the inverse
    autoregressive flow, with `SPLINE` transforms a neural spline flow.
    Sources: Improved Variational Inference with Inverse Autoregressive Flow (2016),
    arXiv:1606.04934; Neural Spline Flows (2019), arXiv:1906.04032.

    Args:
        event_shape: `(D,)`, `D` at least 2.
        kind: `AFFINE` or `SPLINE`.
        transforms: the number of transforms.
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
        # with a cache, like the other transforms: the density of a draw then needs no inverse
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
        transforms: the number of transforms.
        hidden: width of each transform's network.

    Raises:
        ValueError: `latent_dim` is below 2.

    >>> FlowPrior(3)().sample((5,)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self, latent_dim: int, *, kind: Kind = AFFINE, transforms: int = 2, hidden: int = 32
    ) -> None:
        super().__init__(
            latent_dim, partial(AutoRegressiveNN, latent_dim), kind, transforms, hidden
        )
        self.noise = _Noise(latent_dim)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        transforms = [transform.inv for transform in self._transforms()]
        return dist.TransformedDistribution(self.noise(), transforms)


class _CouplingNet(nn.Sequential):
    """The network from `e_a` to `m` and `log s`, both 0 at the start."""

    def __init__(self, kept: int, hidden: Sequence[int], moved: int) -> None:
        layers: list[nn.Module] = []
        for width, next_width in pairwise([kept, *hidden]):
            # tanh bounds `log s`: a `log s` that grows with e would grow with each transform
            layers += [nn.Linear(width, next_width), nn.Tanh()]
        out = nn.Linear(hidden[-1], 2 * moved)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        super().__init__(*layers, out)

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        return super().forward(v).chunk(2, dim=-1)


class CouplingPrior(nn.Module):
    r"""A prior `p(z)`: a coupling flow (RealNVP). A density and a draw take one pass each.

    `z = f(e)`, `e ~ N(0, I)`. Each transform keeps one half of the dimensions, `e_a`, and moves the
    other half, `e_b -> m(e_a) + s(e_a) e_b`, with `log s` between -5 and 3. Before each transform
    the dimensions are rolled by half of their number, so that the halves change places.
    `log |det df/de|` is the sum of all `log s`. The prior starts at `N(0, I)`; labels are ignored.
    Source: Density estimation using Real NVP (2016), arXiv:1605.08803.

    Args:
        latent_dim: `D`, at least 2.
        transforms: the number of transforms; each moves half of the dimensions.
        hidden: widths of the hidden layers of each transform's network, one or more.

    Raises:
        ValueError: `latent_dim` is below 2, or there is no hidden layer.

    >>> CouplingPrior(3)().sample((5,)).shape
    torch.Size([5, 3])
    """

    turn: Tensor

    def __init__(
        self, latent_dim: int, *, transforms: int = 4, hidden: Sequence[int] = (64,)
    ) -> None:
        super().__init__()
        _check_dim(latent_dim)
        if not hidden:
            raise ValueError(f"hidden must be the width of one layer or more, not {tuple(hidden)}")
        self.noise, self._kept = _Noise(latent_dim), latent_dim // 2
        turn = torch.arange(latent_dim).roll(-self._kept)  # a reversal keeps the middle in place
        self.register_buffer("turn", turn, persistent=False)
        moved = latent_dim - self._kept
        self.nets = nn.ModuleList(
            _CouplingNet(self._kept, hidden, moved) for _ in range(transforms)
        )

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        transforms: list[Transform] = []
        for net in self.nets:
            transforms += [T.Permute(self.turn), T.AffineCoupling(self._kept, net)]
        return dist.TransformedDistribution(self.noise(), transforms)
