r"""Simulation-based calibration: tests whether `q(z|x)` is the posterior, on simulated images.

If `z ~ p(z)` and `x ~ p(x|z)`, then `z` is a draw of the posterior `p(z|x)`. So if the guide equals
this posterior, the rank of each unit of `z` among draws of `q(z|x)` is uniform.
Source: Validating Bayesian Inference Algorithms with Simulation-Based Calibration (2018),
arXiv:1804.06788.
"""

from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import one_hot

from pvae.evaluate.annealed import simulate
from pvae.kinds import Fn, Trace
from pvae.objectives import latent_names
from pvae.programs import evaluating

_AT_ONCE = 100  # images at a time: bounds the memory
CALIBRATED = 20  # fewest images: 5 or more are then expected in each of at least 4 bins
_BINS = 20  # most bins of the ranks


class Calibration(NamedTuple):
    """The ranks of simulated latents among a guide's draws, and their p-values.

    `ranks` `(N, D)` counts for each image and unit how many of the guide's `num_draws` draws are
    below the latent that made the image. `p_values` `(D,)` test whether a unit's ranks are uniform,
    corrected for the number of units: the smallest p-value judges the whole guide.
    """

    ranks: Tensor
    p_values: Tensor
    num_draws: int


def calibration(
    model: Fn, guide: Fn, x: Tensor, y: Tensor | None = None, *, num_draws: int = 100
) -> Calibration:
    r"""Tests the calibration of `q(z|x)` on `len(x)` simulated images, given the labels `y`.

    The pixels of `x` are not used. A chi-squared test over at most 20 bins compares each unit's
    ranks `r = #{i : z_i < z}`, `z_i ~ q(z|x)`, with the uniform distribution on
    `0, ..., num_draws`. Holm's method corrects the p-values of all units: for an exact guide the
    smallest is below 0.05 in at most 5 % of cases.
    Sources: that of this module; for the correction, A Simple Sequentially Rejective Multiple Test
    Procedure (1979), Scand. J. Statist. 6.

    Raises:
        ValueError: `x` holds fewer than 20 images, `num_draws` is below 4, or the pair has not
            exactly one latent site of shape `(D,)`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> found = calibration(vae.model, vae.guide, torch.zeros(50, 1, 8, 8), num_draws=9)
    >>> found.ranks.shape, int(found.ranks.max()) <= 9, found.p_values.shape
    (torch.Size([50, 2]), True, torch.Size([2]))
    """
    if len(x) < CALIBRATED:
        raise ValueError(f"x must hold at least {CALIBRATED} images, not {len(x)}")
    if num_draws < 4:
        raise ValueError(f"num_draws must be at least 4, not {num_draws}")
    labels = [None] * len(x) if y is None else y.split(_AT_ONCE)
    parts = zip(x.split(_AT_ONCE), labels, strict=False)
    ranks = torch.cat([_ranks(model, guide, *part, num_draws) for part in parts])
    return Calibration(ranks, _holm(_p_values(ranks, num_draws)), num_draws)


def _ranks(model: Fn, guide: Fn, x: Tensor, y: Tensor | None, num_draws: int) -> Tensor:
    """The ranks of simulated latents among the guide's draws, `(B, D)`."""
    made = simulate(model, x, y)
    with evaluating(guide), pyro.plate("particles", num_draws, dim=-2):
        trace: Trace = poutine.trace(guide).get_trace(made.x, y)
    names = latent_names(trace)
    if len(names) != 1 or set(names) != set(made.latents):
        raise ValueError(
            "the pair must have one latent site, the same in both programs, not "
            f"{sorted(made.latents)} in the model and {names} in the guide"
        )
    (name,) = names
    return (trace.nodes[name]["value"] < made.latents[name]).sum(0).cpu()


def _p_values(ranks: Tensor, num_draws: int) -> Tensor:
    """P-values `(D,)` of the chi-squared test that each unit's ranks `(N, D)` are uniform."""
    bins = min(_BINS, num_draws + 1, len(ranks) // 5)
    bin_of = torch.arange(num_draws + 1) * bins // (num_draws + 1)
    shares = bin_of.bincount().double() / (num_draws + 1)  # the bins' widths may differ by one rank
    expected = len(ranks) * shares
    counts = one_hot(bin_of[ranks], bins).sum(0).double()  # (D, bins)
    statistic = ((counts - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (bins - 1) / 2), statistic / 2)


def _holm(p_values: Tensor) -> Tensor:
    """Corrects p-values for their number, by Holm's method.

    >>> _holm(torch.tensor([0.5, 0.01, 0.02]))
    tensor([0.5000, 0.0300, 0.0400])
    """
    ordered, order = p_values.sort()
    factors = torch.arange(len(order), 0, -1)
    corrected = (ordered * factors).cummax(0).values.clamp(max=1)
    return corrected[order.argsort()]
