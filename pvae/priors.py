"""Priors p(z): modules that return a distribution over the latent.

A conditional pair calls its prior with the labels `y`. A prior that ignores them says so in its
docstring. A prior `p(z | y)` that you write by hand sets `takes_y = True`.
"""

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pvae.kinds import Shape


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


class StandardNormal(nn.Module):
    r"""The standard normal prior `p(z) = N(0, I)` over `(D,)` latents; labels are ignored.

    Raises:
        ValueError: `latent_dim` is below 1.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        # buffers, so that they follow .to(device) and .double(); constant, so they are not saved
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class _Mixture(dist.MixtureSameFamily):
    """A mixture with the support of its components: NUTS cannot transform to torch's own one."""

    @property
    def support(self) -> constraints.Constraint:
        return self.component_distribution.support


class MixtureOfNormals(nn.Module):
    r"""A learned mixture of `K` diagonal normals, `p(z) = sum_k w_k N(z; loc_k, scale_k)`; labels
    are ignored.

    Raises:
        ValueError: `latent_dim` or `components` is below 1.

    >>> MixtureOfNormals(3, components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def __init__(self, latent_dim: int, *, components: int = 10) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        _check_count("components", components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent_dim))  # equal rows would stay equal
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return _Mixture(dist.Categorical(logits=self.logits), components)


class VampPrior(nn.Module):
    r"""The mixture of posteriors at `K` learned pseudo-inputs (VampPrior).

    `p(z | y) = sum_k w_k q(z | u_k, y)`. `posterior` is the guide's own module: the prior follows
    q. The mixture approximates the aggregate posterior, which is the best prior for a given q.
    `u_k = sigmoid(v_k)` are images in [0, 1]; for counts `u_k = softplus(v_k)` is at least 0.
    Source: VAE with a VampPrior (2017), arXiv:1705.07120.

    Args:
        posterior: a module with `posterior(x)` or `posterior(x, y)`, shared with the guide.
        image_shape: `(C, H, W)`, or the shape of one datum of any other kind.
        components: `K`.
        mean_image: `image_shape`; the pseudo-inputs start around it, or around 1/2 without it.
        counts: whether the data are counts, not numbers in [0, 1].
        label_dim: dimensions of one `y`: 0 for a label, 1 for a side vector.

    Raises:
        ValueError: `components` is below 1, or the posterior has BatchNorm, whose statistics would
            then come from both pseudo-inputs and data.

    >>> from pvae.heads import Normal
    >>> posterior = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), Normal((3,)))
    >>> VampPrior(posterior, (1, 2, 2), components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        posterior: nn.Module,
        image_shape: Shape,
        *,
        components: int = 100,
        mean_image: Tensor | None = None,
        counts: bool = False,
        label_dim: int = 0,
    ) -> None:
        super().__init__()
        _check_count("components", components)
        if any(hasattr(module, "running_mean") for module in posterior.modules()):
            raise ValueError(
                "posterior has BatchNorm: a VampPrior puts its pseudo-inputs through it, and their "
                "statistics would be mixed with those of the data; choose a net without BatchNorm"
            )
        self.posterior, self.counts, self.label_dim = posterior, counts, label_dim
        start = torch.full(tuple(image_shape), 0.5) if mean_image is None else mean_image.cpu()
        # the inverse of softplus, or of the sigmoid
        start = start.clamp(min=0.05) if counts else start.clamp(0.05, 0.95)
        start = start + (-torch.expm1(-start)).log() if counts else start.logit()
        self.pseudo_inputs = nn.Parameter(start + torch.randn(components, *image_shape))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        v = self.pseudo_inputs  # (K, *event)
        u = nn.functional.softplus(v) if self.counts else v.sigmoid()
        # labels (*) become (*, 1); with the components (K,) the batch shape is (*, K)
        given = () if y is None else (y.unsqueeze(-1 - self.label_dim),)
        components = self.posterior(u, *given)
        logits = self.logits.expand(components.batch_shape)
        return _Mixture(dist.Categorical(logits=logits), components)
