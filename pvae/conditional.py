"""Conditional distributions: a network, then a head that turns its output into a distribution.

The attribute `takes_y` says whether a module is conditional on a label or side vector `y`. A
likelihood, posterior or prior that you write by hand sets `takes_y = True` if its `forward` takes
`y`; a module without the attribute takes no `y`.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.functional import one_hot

Join = Callable[[Tensor, Tensor], Tensor]


def ignore_label(v: Tensor, y: Tensor) -> Tensor:
    """A join that leaves the label out on purpose: `p(u | v, y) = p(u | v)`.

    >>> import torch
    >>> ignore_label(torch.zeros(3, 2), torch.tensor([0, 1, 2])).shape
    torch.Size([3, 2])
    """
    return v


class ConcatVector(nn.Module):
    r"""A join that appends a side vector: `join(v, y) = [v, y]`.

    With `y` `(*, S)`, a vector `(*, B, D)` becomes `(*, B, D + S)`. An image `(*, B, C, H, W)`
    becomes `(*, B, C + S, H, W)`, with one plane for each number of `y`, or `(*, B, C H W + S)`
    with `flatten`. The leading dimensions of `v` and `y` broadcast: either may have more of them.

    Args:
        size: `S`.
        event_dim: dimensions of one `v`: 1 for a vector, 3 for an image.
        flatten: makes a vector of each `v` first, for networks without convolutions. From planes
            such a network would see each number of `y` once for every pixel, and would learn from
            `y` far faster than from the image.

    Raises:
        ValueError: a size is below 1; `y` is not floating point `(*, S)`; the shapes of `v` and `y`
            do not broadcast.

    >>> ConcatVector(2)(torch.zeros(3, 1), torch.ones(2))
    tensor([[0., 1., 1.],
            [0., 1., 1.],
            [0., 1., 1.]])
    """

    def __init__(self, size: int, *, event_dim: int = 1, flatten: bool = False) -> None:
        super().__init__()
        for name, value in (("size", size), ("event_dim", event_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.size = size
        self.event_dim = event_dim
        self.flatten = flatten

    def joined_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one `v` after the join, which is the input shape of the next network.

        >>> ConcatVector(10, event_dim=3).joined_shape((1, 28, 28))
        (11, 28, 28)
        >>> ConcatVector(10, event_dim=3, flatten=True).joined_shape((1, 28, 28))
        (794,)
        """
        first, *rest = (prod(event_shape),) if self.flatten else event_shape
        return (first + self.size, *rest)

    def forward(self, v: Tensor, y: Tensor) -> Tensor:
        if not y.is_floating_point() or y.shape[-1:] != (self.size,):
            raise ValueError(
                f"y must be floating point side vectors (*, {self.size}), not {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        return self._concat(v, y)

    def _concat(self, v: Tensor, side: Tensor) -> Tensor:
        lead = v.dim() - self.event_dim
        batch = self._batch_shape(v, side.shape[:-1])
        if self.flatten:
            v = v.flatten(lead)
        first, *rest = v.shape[lead:]
        side = side.reshape(*side.shape, *(1 for _ in rest))  # (*, S, 1, 1) beside an image
        parts = (v.expand(*batch, first, *rest), side.expand(*batch, self.size, *rest))
        return torch.cat(parts, dim=len(batch))

    def _batch_shape(self, v: Tensor, side_batch: torch.Size) -> torch.Size:
        lead = v.dim() - self.event_dim
        try:
            if lead < 0:
                raise RuntimeError
            return torch.broadcast_shapes(v.shape[:lead], side_batch)
        except RuntimeError:
            raise ValueError(
                f"v {tuple(v.shape)} and y {tuple(side_batch)} do not broadcast: the dimensions of "
                f"v, except its last {self.event_dim}, must fit those of y"
            ) from None


class ConcatLabel(ConcatVector):
    r"""A join that appends the one-hot label: `join(v, y) = [v, one_hot(y)]`.

    With `K` classes, a vector `(*, B, D)` becomes `(*, B, D + K)`. An image `(*, B, C, H, W)`
    becomes `(*, B, C + K, H, W)`, with a plane of zeros or ones for each class, or
    `(*, B, C H W + K)` with `flatten`. The leading dimensions of `v` and the shape of `y`
    broadcast: `v` may have particles, `y` may be enumerated, `(K, 1)`, or one label, `()`.

    Args:
        num_classes: `K`; labels are the integers from 0 to `K - 1`.
        event_dim, flatten: as in `ConcatVector`.

    Raises:
        ValueError: a size is below 1; labels are not integers or are out of range; the shapes of
            `v` and `y` do not broadcast.

    Source: Semi-Supervised Learning with Deep Generative Models (2014), arXiv:1406.5298.

    >>> ConcatLabel(3)(torch.zeros(2, 2), torch.tensor([0, 2]))
    tensor([[0., 0., 1., 0., 0.],
            [0., 0., 0., 0., 1.]])
    >>> every = torch.arange(3)[:, None]  # (3, 1): each label for each image
    >>> ConcatLabel(3, event_dim=3)(torch.zeros(5, 1, 8, 8), every).shape
    torch.Size([3, 5, 4, 8, 8])
    """

    def __init__(self, num_classes: int, *, event_dim: int = 1, flatten: bool = False) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        super().__init__(num_classes, event_dim=event_dim, flatten=flatten)
        self.num_classes = num_classes

    def forward(self, v: Tensor, y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # while a graph is traced, tensors have no values
            self._check_labels(y)
        return self._concat(v, one_hot(y.long(), self.num_classes).to(v.dtype))

    def _check_labels(self, y: Tensor) -> None:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(
                f"y has dtype {y.dtype}; labels are integers from 0 to {self.num_classes - 1}, "
                "made one-hot by the join"
            )
        outside = y[(y < 0) | (y >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"y holds the label {outside[0].item()}; labels are integers from 0 to "
                f"{self.num_classes - 1} (num_classes is {self.num_classes})"
            )


class Conditional(nn.Module):
    r"""The conditional distribution `p(u | v, y) = head(net(join(v, y)))`.

    `net` maps tensors to tensors and takes one batch dimension only; `head` maps its output to a
    distribution. `v` may have any leading dimensions, `(*, B) + event`: they are folded into one
    for the network and restored for the head, so particles and enumeration pass through
    convolutions.

    Args:
        net: `(N,) + event -> (N,) + param_shape`.
        head: `(*, B) + param_shape -> Distribution` with batch shape `(*, B)`.
        event_dim: dimensions of one `v` as the network takes it, after the join: 1 for a latent
            vector, 3 for an image, 0 for an index.
        join: combines `v` with a label or side vector `y`; None for a distribution that takes no
            `y`.

    Raises:
        ValueError: `y` is given without a join, or is missing with a join; or the network's output
            does not have the head's `param_shape`.

    >>> import torch
    >>> from pvae.heads import Bernoulli
    >>> likelihood = Conditional(nn.Linear(2, 5), Bernoulli((5,)), event_dim=1)
    >>> likelihood(torch.zeros(7, 3, 2)).batch_shape
    torch.Size([7, 3])
    """

    def __init__(
        self, net: nn.Module, head: nn.Module, *, event_dim: int, join: Join | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.head = head
        self.event_dim = event_dim
        self.join = join

    @property
    def takes_y(self) -> bool:
        """Whether this distribution is conditional on `y`: it has a join."""
        return self.join is not None

    def raw(self, v: Tensor, y: Tensor | None = None) -> Tensor:
        """The head's raw parameters `net(join(v, y))`, shape `(*, B) + param_shape`."""
        v = self._joined(v, y)
        batch = v.shape[: v.dim() - self.event_dim]
        h = self.net(v.reshape(-1, *v.shape[len(batch) :]))
        if v.is_floating_point():
            h = h.to(v.dtype)  # autocast lowers the precision of the network, not of densities
        expected = getattr(self.head, "param_shape", h.shape[1:])
        if h.shape[1:] != expected:
            raise ValueError(
                f"net returns {tuple(h.shape[1:])} for one input, "
                f"but the head needs param_shape {tuple(expected)}"
            )
        return h.reshape(*batch, *h.shape[1:])

    def forward(self, v: Tensor, y: Tensor | None = None) -> Distribution:
        return self.head(self.raw(v, y))

    def _joined(self, v: Tensor, y: Tensor | None) -> Tensor:
        if self.join is None:
            if y is not None:
                raise ValueError(
                    f"y must be None, not of shape {tuple(y.shape)}: this distribution takes no "
                    "labels; construct it with a join (ignore_label leaves them out on purpose)"
                )
            return v
        if y is None:
            raise ValueError("y is missing: this distribution is conditional on labels")
        return self.join(v, y)


def concat_mask(x: Tensor, mask: Tensor) -> Tensor:
    """A join for images with missing pixels: sets these pixels to 0 and appends the mask.

    `x` `(*, B, C, H, W)` and the boolean `mask` `(*, B, 1 or C, H, W)`, True where a pixel is
    seen, become `(*, B, C + 1 or 2 C, H, W)`. The mask tells a seen 0 from a missing pixel.

    Source: Handling Incomplete Heterogeneous Data using VAEs (2018), arXiv:1807.03653 (zeros);
    VAEAC (2018), arXiv:1806.02382 (the appended mask).

    >>> x, mask = torch.ones(1, 1, 1, 2), torch.tensor([[[[True, False]]]])
    >>> concat_mask(x, mask).tolist()
    [[[[1.0, 0.0]], [[1.0, 0.0]]]]
    """
    return torch.cat([x.where(mask, 0), mask.to(x.dtype)], dim=-3)


class Masked(nn.Module):
    r"""A likelihood of the seen pixels alone: `log p(x_seen | z) = sum_{i seen} log p(x_i | z)`.

    The pixels must be independent given `z`, as under every likelihood of `pvae.heads`: the
    missing pixels then integrate to 1 and drop out. In the programs the mask takes the place of a
    label: `Model(prior, Masked(likelihood))(x, mask)`. A missing pixel may hold any value of the
    support: neither the loss nor its gradient depends on this value.

    Args:
        likelihood: a module with `likelihood(z)`, a distribution over `x` made by `.to_event()`.

    Raises:
        ValueError: the distribution was not made by `.to_event()`, or the mask is not boolean.

    >>> from pvae.heads import Bernoulli
    >>> likelihood = Masked(Conditional(nn.Linear(2, 4), Bernoulli((4,)), event_dim=1))
    >>> mask = torch.tensor([True, True, False, False])
    >>> likelihood(torch.zeros(3, 2), mask).log_prob(torch.ones(3, 4)).shape
    torch.Size([3])
    """

    takes_y = True  # the mask takes the place of y

    def __init__(self, likelihood: nn.Module) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, z: Tensor, mask: Tensor) -> Distribution:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean, True where a pixel is seen, not {mask.dtype}")
        p = self.likelihood(z)
        if not isinstance(p, Independent):
            raise ValueError(
                "likelihood must be over independent pixels, made by .to_event(), not a "
                f"{type(p).__name__}: its pixels cannot be left out one by one"
            )
        return p.base_dist.mask(mask).to_event(p.reinterpreted_batch_ndims)
