r"""Heads: from the raw output of a network to a distribution.

A head does not depend on the network before it. Its `param_shape` is the shape of the raw
parameters of one event: with `k` parameters for each element, `(k C, H, W)` for an event
`(C, H, W)` and `(k D,)` for `(D,)`. Log densities are in nats, summed over the event.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pvae.kinds import Shape

Link = Callable[[Tensor], Tensor]


def from_log_scale(raw: Tensor) -> Tensor:
    """The link for a network that returns the log-scale: `scale = exp(raw)`.

    >>> from_log_scale(torch.zeros(1))
    tensor([1.])
    """
    return raw.exp()


def from_log_variance(raw: Tensor) -> Tensor:
    """The link for a network that returns the log-variance: `scale = exp(raw / 2)`.

    >>> from_log_variance(torch.zeros(1))
    tensor([1.])
    """
    return (raw / 2).exp()


class Head(nn.Module):
    """Base of the heads: `forward` maps `(*, B) + param_shape` to a distribution over events.

    `normalized` says whether the head's density integrates (or sums) to 1. A head with
    `normalized = False` is not a likelihood: its numbers cannot be compared with a likelihood's.

    Args:
        event_shape: the shape of one event, such as `(C, H, W)` or `(D,)`.
        params: raw parameters for each element of the event.
        param_shape: shape of one event's raw parameters, in place of `params`.

    Raises:
        ValueError: the event shape is empty or has a size below 1.
    """

    normalized: bool = True

    def __init__(self, event_shape: Shape, params: int = 1, *, param_shape: Shape = ()) -> None:
        super().__init__()
        if not event_shape or min(event_shape) < 1:
            raise ValueError(f"event_shape must be sizes of at least 1, not {tuple(event_shape)}")
        self.event_shape = torch.Size(event_shape)
        self.param_shape = torch.Size(param_shape or (params * event_shape[0], *event_shape[1:]))

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    def forward(self, h: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def raw_mean(self, mean: Tensor) -> Tensor:
        """Returns raw parameters (`param_shape`) that give about this mean (`event_shape`).

        A decoder's output bias starts at them, so that training begins at the mean image.
        """
        raise NotImplementedError


class Bernoulli(Head):
    r"""Independent Bernoulli pixels from logits, for binary data: support `{0, 1}`.

    `log p(x) = sum_i x_i log r_i + (1 - x_i) log(1 - r_i)`, `r = sigmoid(h)`.

    >>> Bernoulli((1, 2, 2))(torch.zeros(5, 1, 2, 2)).log_prob(torch.ones(5, 1, 2, 2))[0].item()
    -2.77...
    """

    def forward(self, h: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=h).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean.clamp(0.01, 0.99).logit()


class _UnitIntervalBernoulli(dist.Bernoulli):
    """A Bernoulli whose `log_prob` also takes values between 0 and 1, with validation on."""

    support = constraints.unit_interval
    has_enumerate_support = False


class GreyBernoulli(Bernoulli):
    """The cross-entropy on grey pixels in [0, 1]. *Not a likelihood*: it does not integrate to 1.

    Many tutorials use it, but its numbers cannot be compared with those of a likelihood. For grey
    data prefer `ContinuousBernoulli`, its normalized form.

    >>> GreyBernoulli((1,))(torch.zeros(1)).log_prob(torch.tensor([0.5])).item()
    -0.693...
    """

    normalized = False

    def forward(self, h: Tensor) -> dist.Distribution:
        return _UnitIntervalBernoulli(logits=h).to_event(self.event_dim)


class _ContinuousBernoulli(dist.TorchDistribution):
    r"""`p(x) = l e^(l x) / (e^l - 1)` on [0, 1], stable in float32 for every logit `l`.

    torch's own class has errors: up to .6 % of the gradient near `l = 0`, and .2 nats beyond 17.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012 (torch's own convention)
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: None = None) -> "_ContinuousBernoulli":
        return _ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def _split(self, threshold: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where `|l|` is small; `l` with 1 in these places; `l` with 0 in all other places.

        Both branches of a `torch.where` need finite gradients, even where they are not selected.
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

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
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

    def forward(self, h: Tensor) -> dist.Distribution:
        return _ContinuousBernoulli(h).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        # Newton steps solve mean(l) = mean; mean(l) is 1/2 + l/12 + ... near 0, 1 - 1/l for large l
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

    Raises:
        ValueError: `min_scale` is negative.

    >>> q = Normal((2,))(torch.zeros(5, 4))
    >>> q.mean.shape, q.stddev[0]
    (torch.Size([5, 2]), tensor([1., 1.]))
    """

    distribution: Any = dist.Normal  # a class that takes loc and scale

    def __init__(
        self, event_shape: Shape, *, link: Link = from_log_variance, min_scale: float = 0.0
    ) -> None:
        super().__init__(event_shape, 2)
        if not min_scale >= 0:
            raise ValueError(f"min_scale must be at least 0, not {min_scale}")
        self.link = link
        self.min_scale = min_scale

    def forward(self, h: Tensor) -> dist.Distribution:
        loc, raw_scale = h.chunk(2, dim=-self.event_dim)
        scale = self.min_scale + self.link(raw_scale)
        return self.distribution(loc, scale).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, torch.zeros_like(mean)])


class NormalFixedScale(Head):
    r"""Independent normals with the loc from the network and one fixed scale.

    Up to a constant its negative log density is the squared error over `2 scale^2`.

    Raises:
        ValueError: `scale` is not above 0.

    >>> NormalFixedScale((3,), scale=0.5)(torch.zeros(3)).stddev
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, event_shape: Shape, *, scale: float = 1.0) -> None:
        super().__init__(event_shape)
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

    Raises:
        ValueError: `min_scale` is not from 0 to below `scale`.

    >>> NormalSharedScale((3,), scale=0.5, min_scale=0.0)(torch.zeros(3)).stddev.detach()
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, event_shape: Shape, *, scale: float = 0.5, min_scale: float = 0.01) -> None:
        super().__init__(event_shape)
        if not 0 <= min_scale < scale:
            raise ValueError(
                f"min_scale must be from 0 to below the scale {scale}, not {min_scale}"
            )
        self.min_scale = min_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale - min_scale)))

    def forward(self, h: Tensor) -> dist.Distribution:
        scale = self.min_scale + self.log_scale.exp()
        return dist.Normal(h, scale.expand_as(h)).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean


class Laplace(Normal):
    r"""Independent Laplace pixels, loc and scale from the network: any real data.

    `log p(x) = sum_i -|x_i - loc_i| / s_i - log(2 s_i)`, with `s = min_scale + exp(raw)`: the
    likelihood of the absolute error. Use it for grey pixels; dequantise them if the scale may
    become small.

    Raises:
        ValueError: `min_scale` is negative.

    >>> Laplace((1,))(torch.zeros(2)).log_prob(torch.ones(1)).item()
    -1.69...
    """

    distribution = dist.Laplace

    def __init__(self, event_shape: Shape, *, min_scale: float = 0.01) -> None:
        super().__init__(event_shape, link=from_log_scale, min_scale=min_scale)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, torch.full_like(mean, -1.0)])


# ---- likelihoods of counts: whole numbers of at least 0 ----


class Poisson(Head):
    r"""Independent Poisson counts from log-rates: support `{0, 1, 2, ...}`.

    `log P(x) = sum_i x_i h_i - exp(h_i) - log x_i!`. Its variance is its mean; use
    `NegativeBinomial` for counts that vary more.

    >>> Poisson((3,))(torch.zeros(5, 3)).mean[0]
    tensor([1., 1., 1.])
    """

    def forward(self, h: Tensor) -> dist.Distribution:
        return dist.Poisson(h.exp()).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return mean.clamp(min=0.01).log()


class NegativeBinomial(Head):
    r"""Independent negative binomial counts, mean and dispersion from the network.

    With the mean `m = exp(h)` and the dispersion `a = min_dispersion + exp(raw)` the variance is
    `m + a m^2`: a Poisson whose rate varies. The first half of the raw parameters is the log-mean,
    the second the log-dispersion. `a = 0` is the Poisson; near it the log density is a small
    difference of large numbers, which float32 cannot resolve, so `a` has the floor
    `min_dispersion`.
    Source: scVI, Deep generative modeling for single-cell transcriptomics (2018), Nature Methods
    15, 1053-1058.

    Raises:
        ValueError: `min_dispersion` is negative.

    >>> p = NegativeBinomial((2,), min_dispersion=0.0)(torch.zeros(5, 4))
    >>> p.mean[0], p.variance[0]
    (tensor([1., 1.]), tensor([2., 2.]))
    """

    def __init__(self, event_shape: Shape, *, min_dispersion: float = 1e-3) -> None:
        super().__init__(event_shape, 2)
        if not min_dispersion >= 0:
            raise ValueError(f"min_dispersion must be at least 0, not {min_dispersion}")
        self.min_dispersion = min_dispersion

    def forward(self, h: Tensor) -> dist.Distribution:
        log_mean, raw = h.chunk(2, dim=-self.event_dim)
        dispersion = self.min_dispersion + raw.exp()
        logits = log_mean + dispersion.log()
        return dist.NegativeBinomial(1 / dispersion, logits=logits).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean.clamp(min=0.01).log(), torch.full_like(mean, -1.0)])


# ---- likelihoods of 8-bit pixels: probabilities of the 256 grey levels k / 255 ----

LEVELS = 256
_STEP = 1 / (LEVELS - 1)


class _GreyLevels(constraints.Constraint):
    """The 256 grey levels k / 255 of 8-bit pixels."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        level = value * (LEVELS - 1)
        is_level = (level - level.round()).abs() < 1e-2  # float32 rounds k / 255
        return is_level & (level > -0.5) & (level < LEVELS - 0.5)

    def __repr__(self) -> str:
        return "the 256 grey levels k / 255"


grey_levels = _GreyLevels()


class _DiscretizedLogistic(dist.TorchDistribution):
    r"""A logistic variable, rounded to the nearest grey level and clipped to [0, 1].

    `P(k / 255) = sigmoid(a) - sigmoid(b)`, `a, b = (k / 255 +- 1 / 510 - loc) / scale`; `a` is
    infinity for the last level, and `b` is minus infinity for the first.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = grey_levels

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: None = None) -> "_DiscretizedLogistic":
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return _DiscretizedLogistic(loc, scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        a = (value + _STEP / 2 - self.loc) / self.scale
        b = (value - _STEP / 2 - self.loc) / self.scale
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)): in this form no two
        # nearly equal numbers are subtracted, even far out in the tails
        inside = (-torch.expm1(-_STEP / self.scale)).log()
        upper = torch.where(value > 1 - _STEP / 2, 0.0, logsigmoid(a))
        lower = torch.where(value < _STEP / 2, 0.0, logsigmoid(-b))
        is_edge = (value > 1 - _STEP / 2) | (value < _STEP / 2)
        return upper + lower + torch.where(is_edge, 0.0, inside)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            tiny = torch.finfo(self.loc.dtype).tiny
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(min=tiny)
            x = self.loc + self.scale * (u.log() - torch.log1p(-u))
            return _as_level(x)

    @property
    def mean(self) -> Tensor:
        # E[k] = sum_k P(K >= k), one level at a time: a tensor of all levels would be large
        total = torch.zeros_like(self.loc)
        for k in range(1, LEVELS):
            total = total + torch.sigmoid((self.loc - (k - 0.5) * _STEP) / self.scale)
        return total * _STEP


def _as_level(x: Tensor) -> Tensor:
    return (x * (LEVELS - 1)).round().clamp(0, LEVELS - 1) / (LEVELS - 1)


MIN_LOGISTIC_SCALE = 1e-3  # a quarter of a level: below it the probabilities no longer change


class DiscretizedLogistic(Head):
    r"""Discretised logistic pixels for 8-bit data, loc and scale from the network.

    The support is `{0, 1/255, ..., 1}`. P is a probability, so results also have bits per
    dimension. `log P(x) = sum_i log(sigmoid(a_i) - sigmoid(b_i))`, `a, b = (x +- 1/510 - loc) / s`,
    `s = exp(raw) + 0.001`; the first and the last level include the tails.
    Source: Improved Variational Inference with Inverse Autoregressive Flow (2016),
    arXiv:1606.04934, section 5.2.

    >>> p = DiscretizedLogistic((1,))(torch.tensor([0.5, -2.0]))
    >>> x = torch.arange(256)[:, None] / 255
    >>> round(p.log_prob(x).exp().sum().item(), 4)
    1.0
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape, 2)

    def forward(self, h: Tensor) -> dist.Distribution:
        loc, raw_scale = h.chunk(2, dim=-self.event_dim)
        scale = raw_scale.exp() + MIN_LOGISTIC_SCALE
        return _DiscretizedLogistic(loc, scale).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, torch.full_like(mean, -2.0)])


class _FlatMixture(dist.MixtureSameFamily):
    """A mixture whose support is that of its components, which may be discrete."""

    @property
    def support(self) -> constraints.Constraint:
        return self.component_distribution.support


class MixtureOfDiscretizedLogistics(Head):
    r"""A mixture of `K` discretised logistics for each pixel, for 8-bit data.

    The support is `{0, 1/255, ..., 1}`; results are in nats and bits per dimension.
    `log P(x) = sum_i log sum_k w_ik (sigmoid(a_ik) - sigmoid(b_ik))`; pixels and channels are
    independent given `z`.
    Source: PixelCNN++ (2017), arXiv:1701.05517, without its autoregression.

    Args:
        event_shape: `(C, H, W)`.
        components: `K`.

    Raises:
        ValueError: `components` is below 1.

    >>> MixtureOfDiscretizedLogistics((1,), components=3)(torch.zeros(9)).mean.shape
    torch.Size([1])
    """

    def __init__(self, event_shape: Shape, *, components: int = 5) -> None:
        if components < 1:
            raise ValueError(f"components must be at least 1, not {components}")
        super().__init__(event_shape, 3 * components)
        self.components = components

    def forward(self, h: Tensor) -> dist.Distribution:
        # (*, 3 K C, H, W) -> (*, C, H, W, K) thrice
        raw = h.unflatten(-self.event_dim, (3, self.components, -1)).movedim(
            -self.event_dim - 1, -1
        )
        logits, loc, raw_scale = raw.unbind(-self.event_dim - 2)
        components = _DiscretizedLogistic(loc, raw_scale.exp() + MIN_LOGISTIC_SCALE)
        mixture = _FlatMixture(dist.Categorical(logits=logits), components)
        return mixture.to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        # the components start with different locs: equal components would stay equal
        spread = torch.linspace(-0.2, 0.2, self.components) if self.components > 1 else [0.0]
        locs = [mean + float(s) for s in spread]
        k = self.components
        return torch.cat([*[0 * mean] * k, *locs, *[torch.full_like(mean, -2.0)] * k])


class _LevelCategorical(dist.TorchDistribution):
    """Grey levels k / 255 with any probabilities: logits `(*, 256)`."""

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = grey_levels

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: None = None) -> "_LevelCategorical":
        return _LevelCategorical(self.logits.expand(*batch_shape, LEVELS), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        level = (value * (LEVELS - 1)).round().long()[..., None]  # (*, 1)
        shape = torch.broadcast_shapes(level.shape[:-1], self.batch_shape)
        logits = self.logits.expand(*shape, LEVELS)
        chosen = logits.gather(-1, level.expand(*shape, 1)).squeeze(-1)
        return chosen - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        with torch.no_grad():
            level = dist.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
            return level.to(self.logits.dtype) / (LEVELS - 1)

    @property
    def mean(self) -> Tensor:
        levels = torch.arange(LEVELS, dtype=self.logits.dtype, device=self.logits.device)
        return self.logits.softmax(-1) @ levels / (LEVELS - 1)


class Categorical(Head):
    r"""A free probability for each of the 256 levels of each pixel, for 8-bit data.

    The support is `{0, 1/255, ..., 1}`; results are in nats and bits per dimension.
    `log P(x) = sum_i h_i[255 x_i] - log sum_k e^h_i[k]`. It ignores the order of the levels, and it
    takes 256 raw parameters for each element: use it for small images.

    >>> Categorical((2,))(torch.zeros(512)).log_prob(torch.tensor([0.0, 1.0])).item()
    -11.09...
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape, LEVELS)

    def forward(self, h: Tensor) -> dist.Distribution:
        logits = h.unflatten(-self.event_dim, (LEVELS, -1)).movedim(-self.event_dim - 1, -1)
        return _LevelCategorical(logits).to_event(self.event_dim)

    def raw_mean(self, mean: Tensor) -> Tensor:
        levels = torch.linspace(0, 1, LEVELS).to(mean).reshape(-1, *(1 for _ in mean.shape))
        return (-((levels - mean) ** 2) / (2 * 0.1**2)).flatten(0, 1)


# ---- posteriors over latents (D,) beyond the diagonal normal ----


def _check_vector(event_shape: Shape) -> int:
    if len(event_shape) != 1:
        raise ValueError(f"event_shape must be (D,) for this head, not {tuple(event_shape)}")
    return event_shape[0]


class FullCovariance(Head):
    r"""A normal with a full covariance `L L^T`, loc and lower triangle `L` from the network.

    Raw parameters `(D + D (D + 1) / 2,)`: loc, the logarithms of the diagonal of `L`, and the
    entries below the diagonal. This normal can follow the correlations of the true posterior; its
    cost grows as `D^2`.

    Raises:
        ValueError: `event_shape` is not `(D,)`.

    >>> q = FullCovariance((3,))(torch.zeros(5, 9))
    >>> q.batch_shape, q.covariance_matrix[0].diagonal()
    (torch.Size([5]), tensor([1., 1., 1.]))
    """

    def __init__(self, event_shape: Shape) -> None:
        dim = _check_vector(event_shape)
        super().__init__(event_shape, param_shape=(2 * dim + dim * (dim - 1) // 2,))

    def forward(self, h: Tensor) -> dist.Distribution:
        dim = self.event_shape[0]
        loc, log_diagonal, below = h.split([dim, dim, h.shape[-1] - 2 * dim], dim=-1)
        scale_tril = torch.diag_embed(log_diagonal.exp())
        # by indices: torch's vec_to_tril_matrix uses a boolean mask, which cannot be traced
        rows, columns = torch.tril_indices(dim, dim, -1, device=h.device)
        scale_tril[..., rows, columns] = below
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class LowRankCovariance(Head):
    r"""A normal with the covariance `F F^T + diag(d)`, where `F` is `(D, r)`.

    Raw parameters `(2 D + D r,)`: loc, log d, F. This normal can follow the strongest correlations;
    its cost grows as `D r`.

    Args:
        event_shape: `(D,)`.
        rank: `r`, from 1 to `D`.

    Raises:
        ValueError: `event_shape` is not `(D,)`, or `rank` is not from 1 to `D`.

    >>> q = LowRankCovariance((3,), rank=1)(torch.zeros(5, 9))
    >>> q.batch_shape, q.variance[0]
    (torch.Size([5]), tensor([1., 1., 1.]))
    """

    def __init__(self, event_shape: Shape, *, rank: int = 2) -> None:
        dim = _check_vector(event_shape)
        if not 1 <= rank <= dim:
            raise ValueError(f"rank must be from 1 to the latent's dimension {dim}, not {rank}")
        super().__init__(event_shape, 2 + rank)
        self.rank = rank

    def forward(self, h: Tensor) -> dist.Distribution:
        dim = self.event_shape[0]
        loc, log_d, factor = h.split([dim, dim, dim * self.rank], dim=-1)
        factor = factor.unflatten(-1, (dim, self.rank))
        return dist.LowRankMultivariateNormal(loc, factor, log_d.exp())


class _MixtureOfNormals(dist.MixtureOfDiagNormals):
    """Pyro's mixture with reparameterized draws, which here has a mean too."""

    @property
    def mean(self) -> Tensor:
        return (self.probs[..., None] * self.locs).sum(-2)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        if len(sample_shape) == 0:
            return super().rsample()
        return self.expand(torch.Size(sample_shape) + self.batch_shape).rsample()


class MixtureOfNormals(Head):
    r"""A mixture of `K` diagonal normals, for posteriors with several modes.

    `q(z) = sum_k w_k N(z; loc_k, scale_k)`, by Pyro's `MixtureOfDiagNormals`, whose draws have
    pathwise derivatives. Raw parameters `(K (2 D + 1),)`.
    Source: Pathwise Derivatives for Multivariate Distributions (2018), arXiv:1806.01856.

    Args:
        event_shape: `(D,)`, with `D` of at least 2.
        components: `K`, at least 2.

    Raises:
        ValueError: `event_shape` is not `(D,)`, or `D` or `K` is below 2, where Pyro has no
            pathwise derivative.

    >>> MixtureOfNormals((2,), components=3)(torch.zeros(5, 15)).mean.shape
    torch.Size([5, 2])
    """

    def __init__(self, event_shape: Shape, *, components: int = 4) -> None:
        dim = _check_vector(event_shape)
        if dim < 2 or components < 2:
            raise ValueError(
                "a reparameterized mixture needs a latent of at least 2 dimensions and 2 "
                f"components, not {dim} and {components}"
            )
        super().__init__(event_shape, param_shape=(components * (2 * dim + 1),))
        self.components = components

    def forward(self, h: Tensor) -> dist.Distribution:
        k, dim = self.components, self.event_shape[0]
        logits, loc, log_variance = h.split([k, k * dim, k * dim], dim=-1)
        scale = (log_variance / 2).exp().unflatten(-1, (k, dim))
        return _MixtureOfNormals(loc.unflatten(-1, (k, dim)), scale, logits)


class _ScoreFunctionNormal(dist.Normal):
    """A normal whose draws carry no gradient, so that Pyro uses the score function."""

    has_rsample = False


class ScoreFunctionNormal(Normal):
    r"""The diagonal normal of `Normal`, without reparameterized draws.

    Pyro then takes the score-function gradient `E[(log p(x, z) - log q(z|x)) grad log q(z|x)]`,
    which is unbiased and has a high variance.
    Source: Black Box Variational Inference (2014), arXiv:1401.0118.

    >>> ScoreFunctionNormal((2,))(torch.zeros(5, 4)).has_rsample
    False
    """

    distribution = _ScoreFunctionNormal
