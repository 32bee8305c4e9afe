"""Functions, fixtures and tables that the tests share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pvae.builder import GUIDES, LIKELIHOODS, NETS, build
from pvae.objectives import OBJECTIVES
from pvae.vae import VAE

# the pairs are tiny, so several threads would only wait for one another
torch.set_num_threads(1)

SHAPES = [(1, 8, 8), (3, 9, 6)]  # a square grey image; a colour image with an odd side


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


EXAMPLES = Path(__file__).parent.parent / "examples"
BENCHMARKS = EXAMPLES.parent / "benchmarks"
sys.path += [str(EXAMPLES), str(BENCHMARKS)]


def example(name: str) -> ModuleType:
    """Loads an example as a module, so that a test can call its `main` in the test's process."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(likelihood: str, shape: tuple[int, ...], n: int = 6) -> torch.Tensor:
    """Returns random images in the support of a named likelihood, float64."""
    return in_support(likelihood, torch.rand(n, *shape, dtype=torch.float64))


def in_support(likelihood: str, x: torch.Tensor) -> torch.Tensor:
    """Maps numbers in [0, 1] to the support of a named likelihood; counts are 0 to 9."""
    kind = LIKELIHOODS[likelihood].data
    if kind == "continuous":
        return x
    most = {"binary": 1, "levels": 255, "counts": 9}[kind]
    return (x * most).round() / (1 if kind == "counts" else most)


def tiny(
    likelihood: str = "bernoulli",
    guide: str = "normal",
    shape: tuple[int, ...] = (1, 8, 8),
    net: str = "conv",
    latent_dim: int = 3,
) -> VAE:
    hidden = None if NETS[net].hidden is None else 16
    return build(shape, latent_dim, net, likelihood, guide, hidden=hidden)


# the guides that have a closed form and reparameterized draws
CLOSED = [name for name, g in GUIDES.items() if g.split and not name.startswith("score_function")]
PAIRS = [(likelihood, guide) for likelihood in LIKELIHOODS for guide in CLOSED]

# the objectives whose gradient equals the gradient of their loss by hand at the same noise
BY_HAND = [name for name in OBJECTIVES if name not in ("dreg", "info_vae")]
