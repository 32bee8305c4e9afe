"""What the tests share."""

import pytest
import torch

from pvae.vae import GUIDES, LIKELIHOODS, VAE, build

# the pairs are tiny: threads would only wait for one another
torch.set_num_threads(1)

SHAPES = [(1, 8, 8), (3, 9, 6)]  # square and grey; odd, not square and in colour


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(likelihood: str, shape: tuple[int, ...], n: int = 6) -> torch.Tensor:
    """Images in the support of a named likelihood, float64."""
    x = torch.rand(n, *shape, dtype=torch.float64)
    return (x > 0.5).double() if LIKELIHOODS[likelihood].binary else x


def tiny(
    likelihood: str = "bernoulli",
    guide: str = "normal",
    shape: tuple[int, ...] = (1, 8, 8),
    net: str = "conv",
    latent_dim: int = 3,
) -> VAE:
    return build(shape, latent_dim, net, likelihood, guide, hidden=16)


PAIRS = [(likelihood, guide) for likelihood in LIKELIHOODS for guide in GUIDES]
