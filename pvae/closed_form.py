r"""The ELBO written by hand, in torch alone: an independent check of the ELBO that Pyro computes.

`ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z))`, in nats for each image, for diagonal normal
posteriors and the standard normal prior. Nothing here uses Pyro or `torch.distributions`' own
densities; each formula is written out.
Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114, appendix B.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

_LOG_2PI = math.log(2 * math.pi)


class Terms(NamedTuple):
    """The terms of the ELBO, in nats, for each image; shapes `(*, B)`.

    `kl` is the analytic KL, None where there is none; `kl_sampled` is `log q(z|x) - log p(z)` at
    the sample, an unbiased estimate of the KL; `kl_by_unit` `(B, D)` is the analytic KL of each
    latent unit, None where the KL is not a sum over units.

    >>> Terms(torch.tensor([-90.0]), torch.tensor([20.0]), torch.tensor([21.0])).elbo()
    tensor([-110.])
    """

    reconstruction: Tensor
    kl: Tensor | None
    kl_sampled: Tensor
    kl_by_unit: Tensor | None = None

    def elbo(self, beta: float = 1.0) -> Tensor:
        """`reconstruction - beta KL` with the analytic KL; `ValueError` where there is none."""
        if self.kl is None:
            raise ValueError("kl is None: there is no analytic KL for this pair; use elbo_sampled")
        return self.reconstruction - beta * self.kl

    def elbo_sampled(self, beta: float = 1.0) -> Tensor:
        """`reconstruction - beta (log q - log p)` at the sample."""
        return self.reconstruction - beta * self.kl_sampled


def _sum_event(t: Tensor, x: Tensor) -> Tensor:
    """Sums `t` `(*, B) + event` over the dimensions of the event; `x` is `(B,) + event`."""
    return t.sum(dim=tuple(range(1 - x.dim(), 0)))


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    r"""`log p(x) = sum_i x_i l_i - log(1 + e^l_i)`, for `x` `(B, *event)`, logits `(*, B, *event)`.

    >>> bernoulli(torch.ones(1, 2), torch.zeros(1, 2))
    tensor([-1.3863])
    """
    return _sum_event(x * logits - softplus(logits), x)


def continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    r"""`log p(x) = sum_i x_i l_i - log(1 + e^l_i) + log C_i`, `C = l / tanh(l / 2)`.

    Source: The continuous Bernoulli (2019), arXiv:1907.06845.

    >>> continuous_bernoulli(torch.full((1, 1), 0.5), torch.zeros(1, 1))
    tensor([0.])
    """
    small = logits.abs() < 0.5
    l = torch.where(small, torch.ones_like(logits), logits)  # noqa: E741
    # log(l / tanh(l/2)) = log 2 + s/12 - 7 s^2/1440 + ..., s = l^2: the series of log(y / tanh y)
    s = torch.where(small, logits, torch.zeros_like(logits)) ** 2
    series = s / 12 - 7 * s**2 / 1440 + 31 * s**3 / 90720 - 127 * s**4 / 4838400
    series = series + 73 * s**5 / 34214400 - 1414477 * s**6 / 7846046208000
    series = series + 8191 * s**7 / 523069747200  # to 1e-13 for |l| < .5
    log_c = torch.where(small, math.log(2) + series, (l / torch.tanh(l / 2)).log())
    return _sum_event(x * logits - softplus(logits) + log_c, x)


def normal(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""`log N(x; loc, s) = sum_i -((x_i - loc_i) / s_i)^2 / 2 - log s_i - log(2 pi) / 2`.

    >>> normal(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(()))
    tensor([-1.8379])
    """
    standardized = (x - loc) * (-log_scale).exp()
    return _sum_event(-(standardized**2 + _LOG_2PI) / 2 - log_scale, x)


def laplace(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""`log p(x) = sum_i -|x_i - loc_i| / s_i - log(2 s_i)`.

    >>> laplace(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(()))
    tensor([-1.6931])
    """
    return _sum_event(-(x - loc).abs() * (-log_scale).exp() - log_scale - math.log(2), x)


def poisson(x: Tensor, log_rate: Tensor) -> Tensor:
    r"""`log P(x) = sum_i x_i h_i - exp(h_i) - log x_i!`, for counts `x`, log-rates `h`.

    >>> poisson(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([-2.])
    """
    return _sum_event(x * log_rate - log_rate.exp() - torch.lgamma(x + 1), x)


def negative_binomial(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    r"""`log P(x) = sum_i log G(x_i + r_i) / (G(r_i) x_i!) + r_i log(r_i / (r_i + m_i)) +
    x_i log(m_i / (r_i + m_i))`, with the mean `m` and `r` one over the dispersion.

    >>> negative_binomial(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([-1.3863])
    """
    r, logit = (-log_dispersion).exp(), log_mean + log_dispersion  # the logit of m / (r + m)
    ways = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return _sum_event(ways - r * softplus(logit) - x * softplus(-logit), x)


def _log_level(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The log probability of each grey level under a rounded logistic.

    With `m = (x - loc) / s`, `d = 1 / (510 s)`:
    `sigmoid(m + d) - sigmoid(m - d) = sinh d / (cosh m + cosh d)`.
    """
    m = (x - loc) / scale
    d = (1 / 510 / scale).expand_as(m)
    log_sinh = d + torch.log1p(-(-2 * d).exp())  # of 2 sinh d; below, of 2 cosh m + 2 cosh d
    inside = log_sinh - torch.stack([m, -m, d, -d]).logsumexp(0)
    first, last = -softplus(-m - d), -softplus(m - d)
    return torch.where(x < 1 / 510, first, torch.where(x > 1 - 1 / 510, last, inside))


def discretized_logistics(x: Tensor, loc: Tensor, scale: Tensor, logits: Tensor) -> Tensor:
    r"""`log P(x) = sum_i log sum_k w_ik P_ik(x_i)` of grey levels `x` `(B, *event)` under mixtures
    of rounded logistics, `(*, B, K, *event)`.

    >>> loc, scale = torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.1)
    >>> discretized_logistics(torch.full((1, 1), 51 / 255), loc, scale, loc)
    tensor([-6.335...])
    """
    dim = -x.dim()
    log_p = logits.log_softmax(dim) + _log_level(x.unsqueeze(dim), loc, scale)
    return _sum_event(log_p.logsumexp(dim), x)


def grey_categorical(x: Tensor, logits: Tensor) -> Tensor:
    r"""`log P(x) = sum_i h_i[255 x_i] - log sum_k e^h_i[k]`, logits `(*, B, 256, *event)`.

    >>> grey_categorical(torch.zeros(1, 1), torch.zeros(1, 256, 1))
    tensor([-5.5452])
    """
    dim = -x.dim()
    index = (x * 255).round().long().unsqueeze(dim)  # (B, 1, *event)
    index = index.expand(*logits.shape[: logits.dim() - index.dim()], *index.shape)
    return _sum_event(logits.log_softmax(dim).take_along_dim(index, dim).squeeze(dim), x)


def kl_normal(loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""`KL(N(loc, s) || N(0, 1)) = sum_d (s_d^2 + loc_d^2 - 1) / 2 - log s_d`, `(*, D) -> (*)`.

    >>> kl_normal(torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor(0.5000)
    """
    return kl_normal_by_unit(loc, log_scale).sum(-1)


def kl_normal_by_unit(loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""The terms of `kl_normal`, one for each latent unit, `(*, D)`.

    >>> kl_normal_by_unit(torch.tensor([1.0, 0.0]), torch.zeros(2))
    tensor([0.5000, 0.0000])
    """
    return (torch.expm1(2 * log_scale) + loc**2) / 2 - log_scale


def kl_normal_sampled(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    r"""`log N(z; loc, scale) - log N(z; 0, 1)` at the sample `z` `(*, D)`; its mean is the KL.

    >>> kl_normal_sampled(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    tensor(0.)
    """
    standardized = (z - loc) * (-log_scale).exp()
    return ((z**2 - standardized**2) / 2 - log_scale).sum(-1)


def loc_log_variance(h: Tensor) -> tuple[Tensor, Tensor]:
    """Splits `(*, 2 D)` into loc and *log-scale*, where the network returns loc and log-variance.

    >>> loc_log_variance(torch.tensor([1.0, 4.0]))
    (tensor([1.]), tensor([2.]))
    """
    loc, log_variance = h.split(h.shape[-1] // 2, dim=-1)
    return loc, log_variance / 2


def loc_log_scale(h: Tensor) -> tuple[Tensor, Tensor]:
    """Splits `(*, 2 D)` into loc and log-scale.

    >>> loc_log_scale(torch.tensor([1.0, 4.0]))
    (tensor([1.]), tensor([4.]))
    """
    loc, log_scale = h.split(h.shape[-1] // 2, dim=-1)
    return loc, log_scale


@dataclass(frozen=True)
class ClosedForm:
    """The hand-written ELBO of one VAE, from its two networks.

    Args:
        encode: `x (B, C, H, W) -> (B, 2 D)`, the raw parameters of the posterior.
        decode: `z (*, B, D) -> (*, B, ...)`, the raw parameters of the likelihood.
        split: the posterior's raw parameters to `(loc, log_scale)`.
        log_likelihood: `(x, raw parameters) -> log p(x|z)`, `(*, B)`.

    >>> cf = ClosedForm(torch.zeros_like, torch.zeros_like, loc_log_scale, bernoulli)
    >>> cf.terms(torch.ones(1, 2), noise=torch.zeros(1, 1)).kl
    tensor([0.])
    """

    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_likelihood: Callable[[Tensor, Tensor], Tensor]

    def terms(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Terms:
        """The terms at `z` `(*, B, D)`, or at `z = loc + scale * noise` (reparameterized).

        Raises:
            ValueError: not exactly one of `noise` and `z` is given.
        """
        if (noise is None) == (z is None):
            raise ValueError("exactly one of noise and z must be given")
        labels = () if y is None else (y,)
        loc, log_scale = self.split(self.encode(x, *labels))
        if noise is not None:
            z = loc + log_scale.exp() * noise
        assert z is not None
        reconstruction = self.log_likelihood(x, self.decode(z, *labels))
        units = kl_normal_by_unit(loc, log_scale)  # (B, D)
        kl = units.sum(-1).expand_as(reconstruction)
        return Terms(reconstruction, kl, kl_normal_sampled(z, loc, log_scale), units)


def collapsed(mean: Tensor) -> Tensor:
    r"""The best mean `log p(x)` of a Bernoulli decoder that ignores z, in nats per image.

    `sum_i m_i log m_i + (1 - m_i) log(1 - m_i)`, with the mean image `m` `(*event)` of grey images:
    exact in expectation over binarisations of these same images, -206.0 on MNIST's 60,000. A model
    whose ELBO is near this number has collapsed.

    >>> collapsed(torch.tensor([0.5, 0.0]))
    tensor(-0.6931)
    """
    return (torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum()


# ---- the linear Gaussian model, whose evidence and posterior are known ----


@dataclass(frozen=True)
class LinearGaussian:
    r"""`z ~ N(0, I)`, `x|z ~ N(W z + mu, s^2 I)`: the VAE whose evidence and posterior are known.

    `p(x) = N(mu, W W^T + s^2 I)` and `p(z|x) = N(m, P^-1)` with the precision
    `P = I + W^T W / s^2`, one for all `x`, and `m = P^-1 W^T (x - mu) / s^2`. All methods take `x`
    as `(B, *event)`, flattened to `(B, E)`, and return nats for each image; a Gaussian `q(z|x)` is
    given by its `loc` `(B, D)` and the Cholesky factor `scale_tril` `(B, D, D)` of its covariance.
    Source: Probabilistic principal component analysis (1999), J. R. Statist. Soc. B 61, 611-622.

    Args:
        weight: `W`, `(E, D)`.
        mean: `mu`, `(E,)`.
        scale: `s`.

    >>> exact = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)  # p(x) = N(0, 2)
    >>> exact.log_evidence(torch.zeros(1, 1))
    tensor([-1.2655])
    """

    weight: Tensor
    mean: Tensor
    scale: float

    @classmethod
    def fit(cls, x: Tensor, latent_dim: int) -> "LinearGaussian":
        """The maximum-likelihood model of images `(N, *event)`: probabilistic PCA.

        `s^2` is the mean of the covariance's small eigenvalues, and the columns of `W` are its
        first eigenvectors, times `sqrt(eigenvalue - s^2)`.

        Raises:
            ValueError: `latent_dim` is not between 1 and `E - 1`, or `x` leaves no noise, `s = 0`.

        >>> LinearGaussian.fit(
        ...     torch.tensor([[2.0, 1.0], [-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]), 1
        ... )
        LinearGaussian(weight=tensor([[1.7321], [0.0000]]), mean=tensor([0., 0.]), scale=1.0)
        """
        x = x.flatten(1)
        if not 1 <= latent_dim < x.shape[1]:
            raise ValueError(
                f"latent_dim must be at least 1 and below the {x.shape[1]} elements of an image, "
                f"not {latent_dim}"
            )
        eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))  # ascending
        variance = eigenvalues[:-latent_dim].mean()
        if not variance > 0:
            raise ValueError(f"x lies in a subspace of {latent_dim} dimensions: s would be 0")
        weight = vectors[:, -latent_dim:] * (eigenvalues[-latent_dim:] - variance).sqrt()
        return cls(weight.flip(1), x.mean(0), variance.sqrt().item())

    @property
    def precision(self) -> Tensor:
        """`P = I + W^T W / s^2` of the posterior, `(D, D)`.

        >>> LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0).precision
        tensor([[2.]])
        """
        eye = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return eye + self.weight.T @ self.weight / self.scale**2

    def posterior_loc(self, x: Tensor) -> Tensor:
        """The posterior mean `m`, `(B, D)`.

        >>> LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0).posterior_loc(torch.ones(3, 1)).T
        tensor([[0.5000, 0.5000, 0.5000]])
        """
        b = (x.flatten(1) - self.mean) @ self.weight / self.scale**2  # (B, D)
        return torch.linalg.solve(self.precision, b.T).T

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """`log p(x|z)` for `z` `(B, D)`, `(B,)`.

        >>> exact = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
        >>> exact.log_likelihood(torch.ones(1, 1), torch.ones(1, 1))
        tensor([-0.9189])
        """
        log_scale = self.weight.new_tensor(math.log(self.scale))
        return normal(x.flatten(1), z @ self.weight.T + self.mean, log_scale)

    def log_evidence(self, x: Tensor) -> Tensor:
        """`log p(x) = log p(x | z = 0) + m^T P m / 2 - log det P / 2`, `(B,)`.

        >>> exact = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
        >>> exact.log_evidence(torch.ones(1, 1))
        tensor([-1.5155])
        """
        m = self.posterior_loc(x)
        quadratic = ((m @ self.precision) * m).sum(-1)
        return self.log_likelihood(x, 0 * m) + (quadratic - self.precision.logdet()) / 2

    def elbo(self, x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """`log p(x | z = loc) - tr(W S W^T) / 2 s^2 - KL(q || N(0, I))`, `S` the covariance of `q`,
        `(B,)`: the expectation over `q` is in closed form.

        >>> exact = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
        >>> exact.elbo(torch.ones(1, 1), torch.full((1, 1), 0.5), torch.full((1, 1, 1), 0.5**0.5))
        tensor([-1.5155])
        """
        spread = (self.weight @ scale_tril).square().sum((-2, -1)) / self.scale**2
        half_log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = scale_tril.square().sum((-2, -1))
        kl = (trace + loc.square().sum(-1) - loc.shape[-1]) / 2 - half_log_det
        return self.log_likelihood(x, loc) - spread / 2 - kl

    def gap(self, x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """`KL(q(z|x) || p(z|x))`, `(B,)`: the evidence minus the ELBO.

        >>> exact = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
        >>> exact.gap(torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1, 1), 0.5**0.5))
        tensor([0.2500])
        """
        half = torch.linalg.cholesky(self.precision)  # P = half half^T
        trace = (half.T @ scale_tril).square().sum((-2, -1))
        distance = ((loc - self.posterior_loc(x)) @ half).square().sum(-1)
        half_log_dets = half.diagonal().log().sum() + scale_tril.diagonal(
            dim1=-2, dim2=-1
        ).log().sum(-1)
        return (trace + distance - loc.shape[-1]) / 2 - half_log_dets

    def mean_field_gap(self) -> float:
        """The least `KL(q || p(z|x))` of any `q` with a diagonal covariance, the same for all `x`.

        `q` then has the variances `1 / P_dd`, and the KL is `(sum_d log P_dd - log det P) / 2`.

        >>> LinearGaussian(torch.eye(2), torch.zeros(2), 1.0).mean_field_gap()
        0.0
        """
        return ((self.precision.diagonal().log().sum() - self.precision.logdet()) / 2).item()
