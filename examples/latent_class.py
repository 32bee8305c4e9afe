r"""Digits as a latent class: ten classes that nobody named, summed out exactly.

First a mixture: a VAE whose latent is a class y and nothing else. Its likelihood is one template
image for each class, its evidence a sum, and its guide is empty, as there is nothing left to infer:

    log p(x) = log sum_y p(y) p(x | y).

Then with a style z beside the class, drawn by a guide q(z | x), while y is still summed out:

    log p(x) >= E_q(z|x)[ log sum_y p(y) p(x | z, y) ] - KL(q(z|x) || p(z)).

Pyro sums out whatever is marked `infer={"enumerate": "parallel"}`, under `TraceEnum_ELBO`. Given z
the posterior p(y | x, z) is exact, so there is no q(y | x) to train, and none that can collapse.
The labels of the images serve to name the classes afterwards; no model sees them.

Source: Semi-supervised Learning with Deep Generative Models (2014), arXiv:1406.5298, without its
labels; enumeration: Tensor Variable Elimination for Plated Factor Graphs (2019), arXiv:1902.03210.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, infer_discrete
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pvae
from pvae import Conditional, Guide, cli, data, evaluate, plots, report, run
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.programs import Program

# one plate, so Pyro enumerates along dimension -2, left of the batch
ELBO = TraceEnum_ELBO(max_plate_nesting=1)


class Mixture(Program):
    """p(y) p(x | y), the classes equally likely a priori; `likelihood(y)` is over `x`."""

    def __init__(self, classes: int, likelihood: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> None:
        self.register()
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", equally_likely(self.classes, x), infer={"enumerate": "parallel"})
            pyro.sample("x", self.likelihood(y), obs=x)


class StyledMixture(Program):
    """p(y) p(z) p(x | z, y): the same with a style z; `likelihood(z, y)` is over `x`."""

    def __init__(self, classes: int, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> None:
        self.register()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            y = pyro.sample("y", equally_likely(self.classes, x), infer={"enumerate": "parallel"})
            pyro.sample("x", self.likelihood(z, y), obs=x)


def equally_likely(classes: int, like: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=like.new_zeros(classes))


def nothing(x: Tensor) -> None:
    """The empty guide: every latent of the model is summed out."""


def most_probable(model: Program, guide: Callable[..., Any], x: Tensor) -> Tensor:
    """The class of each image `(B,)`: argmax_y p(y | x, z) at a draw of z ~ q(z|x), by Pyro."""
    with evaluate.evaluating(model, guide):
        guide_trace = poutine.trace(guide).get_trace(x)
        replayed = poutine.replay(model, trace=guide_trace)
        decided = infer_discrete(replayed, first_available_dim=-2, temperature=0)
        trace: Any = poutine.trace(decided).get_trace(x)
        return trace.nodes["y"]["value"]
