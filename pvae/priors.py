"""Priors p(z): modules that return a distribution over the latent."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    r"""The standard normal prior `p(z) = N(0, I)` over `(D,)` latents; takes no notice of labels.

    Raises:
        ValueError: `latent_dim` is below 1.

    >>> StandardNormal(3)().event_shape
    torch.Size([3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        # buffers, so that they follow .to(device) and .double(); constant, so they are not saved
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, y: Tensor | None = None) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
