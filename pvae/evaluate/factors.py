r"""One variational factor for each image, optimized for this image: the cost of amortization.

    log p(x) - ELBO(encoder)  =  log p(x) - ELBO(factor)           approximation gap: the family
                              +  ELBO(factor) - ELBO(encoder)      amortization gap: the sharing

Source: Inference Suboptimality in Variational Autoencoders (2018), arXiv:1801.03558.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pvae.conditional import Conditional, ignore_label
from pvae.evaluate.bounds import elbo, fixed_noise
from pvae.evaluate.importance import importance_weighted
from pvae.heads import FullCovariance
from pvae.kinds import Fn, Trace
from pvae.objectives import OBJECTIVES, latent_names
from pvae.optim import SingleOptimizer
from pvae.programs import Guide, evaluating


class Gaps(NamedTuple):
    """`amortization = factor - encoder` and `approximation = log_evidence - factor`, nats, `(B,)`.

    `encoder` and `factor` are the ELBOs of the guide and of the image's own factor, at the same
    noise; `log_evidence` is an importance-weighted bound by the factor. If the factors are not yet
    at their optimum, the amortization gap is too small and the approximation gap too large. The
    approximation gap is also too small by the amount by which the bound is below log p(x).
    """

    amortization: Tensor
    approximation: Tensor
    encoder: Tensor
    factor: Tensor
    log_evidence: Tensor


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Runs the block with the model in eval mode and its parameters frozen; restores both."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def one_factor_each(guide: nn.Module, x: Tensor, y: Tensor | None = None) -> Guide:
    """The guide `q(z | index)`: a factor for each `x` `(N, C, H, W)`, from the encoder's output.

    Raises:
        ValueError: `guide` is not a `Guide` with a `Conditional`, whose head the factors need.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> factors = one_factor_each(vae.guide, torch.ones(5, 1, 8, 8))
    >>> factors.posterior(torch.arange(5)).batch_shape
    torch.Size([5])
    """
    encoder = getattr(guide, "posterior", None)
    if not isinstance(guide, Guide) or not isinstance(encoder, Conditional):
        raise ValueError(
            "guide must be a pvae.Guide with a pvae.Conditional as its posterior, whose head a "
            f"factor can take, not a {type(guide).__name__} with a {type(encoder).__name__}"
        )
    with evaluating(encoder):
        raw = encoder.raw(x, y)  # (N, 2 D)
    factors = nn.Embedding.from_pretrained(raw, freeze=False)
    head = copy.deepcopy(encoder.head).requires_grad_(False)  # a flow's parameters are not trained
    join = None if y is None else ignore_label
    return Guide(Conditional(factors, head, event_dim=0, join=join))


def full_covariance_factors(
    guide: Fn, x: Tensor, y: Tensor | None = None, *, num_draws: int = 1000
) -> Guide:
    r"""The guide `q(z | index)`: a normal with a full covariance for each `x` `(N, C, H, W)`.

    The factors start at the mean and the variances of `num_draws` draws of `guide`, which is any
    program with one vector-valued latent site. After `optimize_factors` they are a far better
    proposal for importance sampling than the encoder's diagonal normals: often their weights are
    reliable (by k-hat) where the encoder's are not. They have `D (D + 3) / 2` numbers for an image.

    Raises:
        ValueError: `num_draws` is below 2, or `guide` has more than one latent site.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> factors = full_covariance_factors(vae.guide, torch.ones(5, 1, 8, 8))
    >>> factors.posterior(torch.arange(5)).covariance_matrix.shape
    torch.Size([5, 2, 2])
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, for a variance, not {num_draws}")
    with evaluating(guide), pyro.plate("particles", num_draws, dim=-2):
        trace: Trace = poutine.trace(guide).get_trace(x, y)
    names = latent_names(trace)
    if len(names) != 1:
        raise ValueError(f"guide must have one latent site, not {len(names)}: {names}")
    z = trace.nodes[names[0]]["value"]  # (draws, N, D)
    dim = z.shape[-1]
    uncorrelated = z.new_zeros(len(x), dim * (dim - 1) // 2)
    raw = torch.cat([z.mean(0), z.std(0).log(), uncorrelated], dim=1)
    factors = nn.Embedding.from_pretrained(raw, freeze=False)
    join = None if y is None else ignore_label
    return Guide(Conditional(factors, FullCovariance((dim,)), event_dim=0, join=join))


def optimize_factors(
    model: nn.Module,
    factors: Guide,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 1000,
    learning_rate: float = 0.03,
    particles: int = 1,
    on_step: Callable[[int], Any] = lambda step: None,
) -> None:
    """Trains the factors of `x` by stock SVI, the model frozen; calls `on_step` after each step.

    >>> import pvae
    >>> vae, x = pvae.build((1, 8, 8), latent_dim=2, net="mlp"), torch.ones(5, 1, 8, 8)
    >>> factors = one_factor_each(vae.guide, x)
    >>> optimize_factors(vae.model, factors, x, steps=2)
    """
    adam = torch.optim.Adam(factors.parameters(), lr=learning_rate)
    schedule = CosineAnnealingLR(adam, steps)
    objective = OBJECTIVES["trace_elbo"].elbo(particles)
    svi = SVI(model, factors, SingleOptimizer(adam), objective)
    index = torch.arange(len(x), device=x.device)
    with _frozen(model):
        for step in range(1, steps + 1):
            svi.step(x, y, index=index)
            schedule.step()
            on_step(step)


def gaps(
    model: nn.Module,
    guide: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 1000,
    num_draws: int = 64,
    num_samples: int = 500,
    seed: int = 0,
    on_step: Callable[[int], Any] = lambda step: None,
) -> Gaps:
    """Amortization and approximation gap of each image, by factors optimized for `steps` steps.

    `num_draws` is the number of draws of both ELBOs, `num_samples` that of the importance-weighted
    bound. Raises the errors of `one_factor_each`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> gaps(vae.model, vae.guide, torch.ones(5, 1, 8, 8), steps=2).amortization.shape
    torch.Size([5])
    """
    factors = one_factor_each(guide, x, y)
    with torch.enable_grad():
        optimize_factors(model, factors, x, y, steps=steps, on_step=on_step)
    own = partial(factors, index=torch.arange(len(x), device=x.device))
    bounds = []
    for program in (guide, own):
        with fixed_noise(x.device, seed):
            bounds.append(elbo(model, program, x, y, num_samples=num_draws).elbo)
    encoder, factor = bounds
    log_evidence = importance_weighted(model, own, x, y, num_samples=num_samples)
    return Gaps(factor - encoder, log_evidence - factor, encoder, factor, log_evidence)
