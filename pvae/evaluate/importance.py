r"""Importance sampling of `log p(x)` with the guide as the proposal, and its diagnostics.

The weights `w_i = p(x, z_i) / q(z_i|x)`, `z_i ~ q(z|x)`, are drawn and summed piece by piece, so
memory does not grow with their number `k`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pvae import captured
from pvae.evaluate.bounds import sum_sites, traces
from pvae.kinds import Fn
from pvae.objectives import latent_names
from pvae.programs import evaluating

DECODES = 2000  # images decoded at a time: bounds the memory
UNRELIABLE = 0.7  # weights with a Pareto k-hat above this are not reliable
_LEAST_TAIL = 10  # fewest weights to fit a Pareto tail to, as in Pyro's psis_diagnostic


class Importance(NamedTuple):
    r"""The result of `k` importance weights for each image, `(B,)` each.

    `log_evidence` is `log 1/k sum_i w_i`: a lower bound on `log p(x)` in expectation, in nats.
    `ess` is `(sum_i w_i)^2 / sum_i w_i^2`, the effective number of draws, between 1 and `k`. It is
    computed from the draws themselves: if all draws miss the posterior, `ess` is not small.
    `pareto_k` is the tail index of the weights, k-hat: the weights have `1 / k-hat` finite moments.
    Above 0.7 neither the bound nor `ess` is reliable at this `k`; `nan` means too few weights. A
    k-hat below 0.7 means that the bound's error is small, not that the bound is tight.
    """

    log_evidence: Tensor
    ess: Tensor
    pareto_k: Tensor


def _log_weights(model: Fn, guide: Fn, x: Tensor, y: Tensor | None, num_samples: int) -> Tensor:
    """`log w_i` of `num_samples` draws for each image, `(num_samples, B)`."""
    shape = (num_samples, len(x))
    model_trace, guide_trace = traces(model, guide, x, y, num_samples)
    log_p = sum_sites(model_trace, model_trace.observation_nodes, shape)
    log_p = log_p + sum_sites(model_trace, latent_names(model_trace), shape)
    return log_p - sum_sites(guide_trace, latent_names(guide_trace), shape)


def _pieces(num_samples: int, images: int) -> list[int]:
    """Splits `num_samples` draws into pieces that decode about `DECODES` images each."""
    at_once = max(1, DECODES // images)
    return [min(at_once, num_samples - done) for done in range(0, num_samples, at_once)]


def _tail_size(num_samples: int) -> int:
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def pareto_k(largest: Tensor) -> float:
    """The tail index of importance weights, from the logarithms of the largest, in any order.

    The smallest of these weights is the threshold: a generalized Pareto distribution is fitted to
    the others' excess over it. The result is `nan` if fewer than 10 weights are above it.
    Sources: Pareto smoothed importance sampling (2015), arXiv:1507.02646; Yes, but did it work?
    (2018), arXiv:1802.02538.

    >>> u = (torch.arange(300) + 0.5) / 300
    >>> round(pareto_k(-0.5 * u.log()), 1)  # weights u^-0.5: their tail index is 0.5
    0.5
    """
    log_weights = largest.double().cpu()
    weights = (log_weights - log_weights.max()).exp()
    excess = weights - weights.min()
    excess = excess[excess > 0]
    if len(excess) < _LEAST_TAIL:
        return math.nan
    return fit_generalized_pareto(excess)[0]


class ImportanceSampler:
    r"""Importance sampling of each image of a batch: the bound, and the diagnostics of its weights.

    The object is called with batches `x` `(B, C, H, W)` (and labels `y`). Memory hardly grows with
    `num_samples`: only the sums of `w` and `w^2` are kept, and the `min(0.2 k, 3 sqrt k)` largest
    weights, to which the Pareto tail is fitted.
    Sources: Importance Weighted Autoencoders (2015), arXiv:1509.00519; of k-hat: see `pareto_k`.

    Args:
        model, guide: the programs; all their sites are in one data plate.
        num_samples: k, for each image.
        compiler: compiles the function of a piece's weights once for each shape, such as
            `captured.inductor`: faster for thousands of pieces. None runs Pyro's handlers for each.

    Raises:
        ValueError: `num_samples` is below 1, or a site is outside the data plate.

    >>> import pvae
    >>> from pvae import captured
    >>> vae, x = pvae.build((1, 8, 8), latent_dim=2, net="mlp"), torch.ones(5, 1, 8, 8)
    >>> sampler = ImportanceSampler(
    ...     vae.model, vae.guide, num_samples=2000, compiler=captured.as_traced
    ... )
    >>> found = sampler(x)
    >>> found.log_evidence.shape, bool((found.ess <= 2000).all())
    (torch.Size([5]), True)
    """

    def __init__(
        self,
        model: Fn,
        guide: Fn,
        *,
        num_samples: int = 500,
        compiler: captured.Compiler | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        self.model, self.guide, self.num_samples = model, guide, num_samples
        self.log_weights: Callable[..., Tensor] = partial(_log_weights, model, guide)
        if compiler is not None:
            self.log_weights = captured.Function(
                self.log_weights,
                [*captured.submodules(model), *captured.submodules(guide)],
                compiler=compiler,
            )

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Importance:
        k = self.num_samples
        total = x.new_full((len(x),), -math.inf)  # log sum of the weights so far
        squares = total  # ... and of their squares
        largest = x.new_empty((0, len(x)))
        with evaluating(self.model, self.guide):
            for draws in _pieces(k, len(x)):
                log_w = self.log_weights(x, y, draws)  # its traces are freed on return
                total = torch.logaddexp(total, log_w.logsumexp(0))
                squares = torch.logaddexp(squares, (2 * log_w).logsumexp(0))
                seen = torch.cat([largest, log_w])
                largest = seen.topk(min(len(seen), _tail_size(k) + 1), dim=0).values
        tails = torch.tensor([pareto_k(column) for column in largest.T])
        return Importance(total - math.log(k), (2 * total - squares).exp(), tails.to(x))


def importance_weighted(
    model: Fn, guide: Fn, x: Tensor, y: Tensor | None = None, *, num_samples: int = 500
) -> Tensor:
    r"""The importance-weighted bound of each image of a batch, `(B,)`, in nats.

    `log p(x) >= E log 1/k sum_i p(x, z_i) / q(z_i|x)`, `k = num_samples`. `k = 1` is the ELBO, and
    the bound does not fall with `k`. Memory does not grow with `k`.
    Source: Importance Weighted Autoencoders (2015), arXiv:1509.00519.

    Raises:
        ValueError: `num_samples` is below 1, or a site is outside the data plate.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> importance_weighted(vae.model, vae.guide, torch.ones(5, 1, 8, 8), num_samples=7).shape
    torch.Size([5])
    """
    return ImportanceSampler(model, guide, num_samples=num_samples)(x, y).log_evidence
