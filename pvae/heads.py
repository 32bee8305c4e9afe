r"""Heads: from the raw output of a network to a distribution.

A head knows nothing of networks. It says by `param_shape` how many raw parameters it needs for
one event: for an event `(C, H, W)` with `k` parameters an element that is `(k C, H, W)`, for
`(D,)` it is `(k D,)`. Log densities are in nats, summed over the event.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

Link = Callable[[Tensor], Tensor]


def from_log_scale(raw: Tensor) -> Tensor:
    """The scale whose logarithm the network returns: `scale = exp(raw)`.

    >>> from_log_scale(torch.zeros(1))
    tensor([1.])
    """
    return raw.exp()


def from_log_variance(raw: Tensor) -> Tensor:
    """The scale whose log-variance the network returns: `scale = exp(raw / 2)`.

    >>> from_log_variance(torch.zeros(1))
    tensor([1.])
    """
    return (raw / 2).exp()


class Head(nn.Module):
    """Base of the heads: `forward` maps `(*, B) + param_shape` to a distribution over events.

    Args:
        event_shape: the shape of one event, such as `(C, H, W)` or `(D,)`.
        params: raw parameters for one element of the event.

    Raises:
        ValueError: the event shape is empty or has a size below 1.
    """

    def __init__(self, event_shape: Sequence[int], params: int) -> None:
        super().__init__()
        if not event_shape or min(event_shape) < 1:
            raise ValueError(f"event_shape must be sizes of at least 1, not {tuple(event_shape)}")
        self.event_shape = torch.Size(event_shape)
        self.param_shape = torch.Size((params * event_shape[0], *event_shape[1:]))

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    def forward(self, h: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def raw_mean(self, mean: Tensor) -> Tensor:
        """Raw parameters (`param_shape`) whose distribution has about this mean (`event_shape`).

        A decoder's output bias starts there, so that training begins at the mean image.
        """
        raise NotImplementedError


class Bernoulli(Head):
    r"""Independent Bernoulli pixels from logits, for binary data: support `{0, 1}`.

    `log p(x) = sum_i x_i log r_i + (1 - x_i) log(1 - r_i)`, `r = sigmoid(h)`.

    >>> Bernoulli((1, 2, 2))(torch.zeros(5, 1, 2, 2)).log_prob(torch.ones(5, 1, 2, 2))[0].item()
    -2.77...
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, 1)

    def forward(self, h: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=h).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean.clamp(0.01, 0.99).logit()


class _UnitIntervalBernoulli(dist.Bernoulli):
    """A Bernoulli whose log_prob is also evaluated between 0 and 1, with validation left on."""

    support = constraints.unit_interval
    has_enumerate_support = False


class GreyBernoulli(Bernoulli):
    """The cross-entropy on grey pixels in [0, 1]. *Not a likelihood*: it does not integrate to 1.

    Widely used in tutorials; its numbers cannot be compared with those of any true likelihood.
    For grey data prefer `ContinuousBernoulli`, which normalizes it.

    >>> GreyBernoulli((1,))(torch.zeros(1)).log_prob(torch.tensor([0.5])).item()
    -0.693...
    """

    def forward(self, h: Tensor) -> dist.Distribution:
        return _UnitIntervalBernoulli(logits=h).to_event(self.event_dim)


class _ContinuousBernoulli(dist.TorchDistribution):
    r"""`p(x) = l e^(l x) / (e^l - 1)` on [0, 1], stable in float32 for every logit `l`.

    torch's own is off by up to .6 % in the gradient near `l = 0`, and by .2 nats beyond 17.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012 (torch's own convention)
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "_ContinuousBernoulli":
        return _ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def _split(self, threshold: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
        """Where |l| is small; `l` made safe to divide by there; `l` made 0 elsewhere.

        Both branches of a `torch.where` need finite gradients, the one not taken too.
        """
        small = self.logits.abs() < threshold
        return small, self.logits.masked_fill(small, 1.0), self.logits.masked_fill(~small, 0.0)

    @property
    def log_normalizer(self) -> Tensor:
        """`log((e^l - 1) / l)`."""
        small, safe, near = self._split()
        a = safe.abs()
        far = safe.clamp(min=0) + (-torch.expm1(-a)).log() - a.log()
        y = (near / 2) ** 2  # log(sinh(sqrt y) / sqrt y), to 1e-14 for |l| < .5
        series = y / 6 - y**2 / 180 + y**3 / 2835 - y**4 / 37800 + y**5 / 467775
        return torch.where(small, near / 2 + series, far)

    @property
    def mean(self) -> Tensor:
        small, safe, near = self._split()
        series = 0.5 + near / 12 - near**3 / 720 + near**5 / 30240 - near**7 / 1209600
        # e^l / (e^l - 1) - 1 / l
        return torch.where(small, series, -1 / torch.expm1(-safe) - 1 / safe)

    @property
    def variance(self) -> Tensor:
        small, safe, near = self._split()
        series = 1 / 12 - near**2 / 240 + near**4 / 6048 - near**6 / 172800
        far = 1 / safe**2 - 1 / (2 * torch.sinh(safe.clamp(-80, 80) / 2)) ** 2
        return torch.where(small, series, far)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - self.log_normalizer

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        small, safe, near = self._split(0.01)
        # the inverse CDF for the logit -|l|, which cannot overflow, mirrored where l > 0
        a = safe.abs()
        x = -torch.log1p(u * torch.expm1(-a)) / a
        x = torch.where(safe > 0, 1 - x, x)
        series = u + u * (1 - u) * near * (0.5 + near * (1 - 2 * u) / 6)
        return torch.where(small, series, x)


class ContinuousBernoulli(Head):
    r"""Continuous Bernoulli pixels from logits, for grey data: support `[0, 1]`.

    `log p(x) = sum_i x_i h_i - log((e^h_i - 1) / h_i)`: the cross-entropy, normalized.
    Source: The continuous Bernoulli: fixing a pervasive error in variational autoencoders
    (2019), arXiv:1907.06845.

    >>> ContinuousBernoulli((1,))(torch.tensor([-1.3862944])).mean.item()
    0.38801...
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, 1)

    def forward(self, h: Tensor) -> dist.Distribution:
        return _ContinuousBernoulli(h).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        # mean(l) = 1/2 + l/12 + ... and 1 + 1/l far out: solved by a few Newton steps
        logits = torch.zeros_like(mean)
        mean = mean.clamp(0.02, 0.98)
        for _ in range(50):
            p = _ContinuousBernoulli(logits)
            logits = logits + (mean - p.mean) / p.variance.clamp(min=1e-4)
        return logits


class Normal(Head):
    r"""Independent normals whose loc and scale both come from the network.

    `scale = min_scale + link(raw scale)`. It serves as the mean-field posterior `q(z|x)` and as
    the Gaussian likelihood with a scale for each pixel. The first half of the raw parameters is
    the loc, the second the raw scale.
    Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114.

    Args:
        event_shape: `(D,)` or `(C, H, W)`.
        link: from the raw scale to a positive number: `from_log_variance` or `from_log_scale`.
        min_scale: floor of the scale. Without one the density of noise-free pixels is unbounded.

    >>> q = Normal((2,))(torch.zeros(5, 4))
    >>> q.mean.shape, q.stddev[0]
    (torch.Size([5, 2]), tensor([1., 1.]))
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        link: Link = from_log_variance,
        min_scale: float = 0.0,
    ) -> None:
        super().__init__(event_shape, 2)
        if min_scale < 0:
            raise ValueError(f"min_scale must be at least 0, not {min_scale}")
        self.link = link
        self.min_scale = min_scale

    def forward(self, h: Tensor) -> dist.Distribution:
        loc, raw_scale = h.chunk(2, dim=-self.event_dim)
        return dist.Normal(loc, self.min_scale + self.link(raw_scale)).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, torch.zeros_like(mean)])


class NormalFixedScale(Head):
    r"""Independent normals with the loc from the network and one fixed scale.

    Up to a constant its log density is the squared error over `2 scale^2`.

    >>> NormalFixedScale((3,), scale=0.5)(torch.zeros(3)).stddev
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, event_shape: Sequence[int], *, scale: float = 1.0) -> None:
        super().__init__(event_shape, 1)
        if not scale > 0:
            raise ValueError(f"scale must be above 0, not {scale}")
        self.scale = scale

    def forward(self, h: Tensor) -> dist.Distribution:
        return dist.Normal(h, torch.full_like(h, self.scale)).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean


class NormalSharedScale(Head):
    r"""Independent normals with the loc from the network and one learned scale for all pixels.

    `scale = min_scale + exp(log_scale)`, `log_scale` a parameter of this module.

    >>> NormalSharedScale((3,), scale=0.5, min_scale=0.0)(torch.zeros(3)).stddev.detach()
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self, event_shape: Sequence[int], *, scale: float = 0.5, min_scale: float = 0.01
    ) -> None:
        super().__init__(event_shape, 1)
        if not 0 <= min_scale < scale:
            raise ValueError(f"0 <= min_scale < scale must hold, not {min_scale} and {scale}")
        self.min_scale = min_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale - min_scale)))

    def forward(self, h: Tensor) -> dist.Distribution:
        scale = self.min_scale + self.log_scale.exp()
        return dist.Normal(h, scale.expand_as(h)).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean
