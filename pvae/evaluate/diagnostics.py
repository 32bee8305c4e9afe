r"""How much the latents are used: active units, information, and the aggregate posterior."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pvae.data import Split, chunks
from pvae.evaluate.bounds import Estimate, estimate, traces
from pvae.kinds import Distribution, Fn, Trace
from pvae.objectives import latent_names
from pvae.programs import evaluating, mean_of

ACTIVE = 0.01  # the variance of a unit's posterior mean above which it is active
_AT_ONCE = 250  # images, and draws, at a time: bounds the memory


def posterior_means(guide: Fn, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The posterior mean of each image, `(B, D)`, for the latent whose name is first in the
    alphabet (`z` or `z1`), whatever the order in which the guide draws.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> posterior_means(vae.guide, torch.ones(5, 1, 8, 8)).shape
    torch.Size([5, 2])
    """
    with evaluating(guide):
        trace: Trace = poutine.trace(guide).get_trace(x, y)
        return mean_of(trace.nodes[min(latent_names(trace))]["fn"])


def unit_variances(means: Tensor) -> Tensor:
    r"""`Var_x(E_q[z_d | x])`, `(N, D) -> (D,)`; a unit is *active* where it exceeds 0.01.

    Source: Importance Weighted Autoencoders (2015), arXiv:1509.00519, section 5.

    >>> (unit_variances(torch.tensor([[0.0, 1.0], [0.0, -1.0]])) > 0.01).tolist()
    [False, True]
    """
    return means.var(0, correction=0)


def active_units(means: Tensor) -> int:
    """Counts the active units of posterior means `(N, D)`.

    >>> active_units(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    1
    """
    return int((unit_variances(means) > ACTIVE).sum())


class Information(NamedTuple):
    r"""The parts of the mean rate, `E_x KL(q(z|x) || p(z)) = I(x; z) + KL(q(z) || p(z))`, in nats.

    `q(z) = 1/N sum_n q(z|x_n)` is the aggregate posterior of N = `images` images. `mutual` is the
    information of z about *which of these* images x is. It is at most `log N`, which it reaches if
    no two posteriors overlap, and it is a lower bound on I(x; z) under the distribution of all
    data. `aggregate` is the rest, `KL(q(z) || p(z))`: an upper bound, which is too large if
    `mutual` is near `log N`. Both have the standard error over the draws.
    """

    mutual: Estimate
    aggregate: Estimate
    images: int


def information(
    model: Fn, guide: Fn, split: Split, *, num_draws: int = 2000, site: str = "z", title: str = ""
) -> Information:
    r"""`I(x; z)` and `KL(q(z) || p(z))` over a whole split, for a pair with one latent site.

    Draws `z ~ q(z|x_n)` for `num_draws` images spread over the split, and compares `q(z|x_n)`,
    `q(z)` (over all images of the split, including `x_n`) and `p(z)` at these draws. The programs
    get the split's `y` if it has one; a `title` shows a progress bar on a terminal.
    Source: ELBO surgery (2016), Hoffman and Johnson, NIPS workshop on approximate inference.

    Raises:
        ValueError: `num_draws` is below 2, or the guide has other latents than `site`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> split = Split(255 * torch.randint(2, (50, 1, 8, 8), dtype=torch.uint8), None)
    >>> found = information(vae.model, vae.guide, split, num_draws=10)
    >>> found.mutual.mean <= math.log(50), found.images
    (True, 50)
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, not {num_draws}")
    images = len(split.images)
    drawn = torch.zeros(images, dtype=torch.bool, device=split.images.device)
    drawn[torch.linspace(0, images - 1, min(num_draws, images)).round().long()] = True
    posteriors, z, log_own, log_prior = [], [], [], []
    with evaluating(model, guide):
        for (x, y), here in zip(chunks(split, _AT_ONCE), drawn.split(_AT_ONCE), strict=True):
            model_trace, guide_trace = traces(model, guide, x, y, 1)
            if latent_names(guide_trace) != [site]:
                raise ValueError(
                    f"site must be the guide's only latent, not {site!r}: its latents are "
                    f"{latent_names(guide_trace)}"
                )
            posteriors.append(guide_trace.nodes[site]["fn"])  # batch shape (1, B)
            z.append(guide_trace.nodes[site]["value"][0, here])
            log_own.append(guide_trace.nodes[site]["log_prob"][0, here])
            log_prior.append(model_trace.nodes[site]["log_prob"][0, here])
        log_aggregate = _log_mixture(posteriors, torch.cat(z), title) - math.log(images)
    mutual = estimate(torch.cat(log_own) - log_aggregate)
    aggregate = estimate(log_aggregate - torch.cat(log_prior))
    return Information(mutual, aggregate, images)


def _log_mixture(posteriors: Sequence[Distribution], z: Tensor, title: str) -> Tensor:
    """`log sum_n q(z_s|x_n)`, `(S,)`, for a part of the draws and images at a time."""
    pieces = []
    # disable=None: no bar where the output is not a terminal
    for piece in tqdm(z.split(_AT_ONCE), title, leave=False, disable=None if title else True):
        over = [q.log_prob(piece[:, None]).logsumexp(1) for q in posteriors]  # (S', 1, D): (S', B)
        pieces.append(torch.stack(over).logsumexp(0))
    return torch.cat(pieces)
