r"""The cross-check: what Pyro computes, held against the hand-written ELBO on a fixed batch.

(a) At the same noise, the loss of the very SVI object that trains against the loss by hand, where
    the objective has one.
(b) `log q(z|x) - log p(z)` against the analytic KL, image by image: the mean of the differences
    is zero up to its standard error.
"""

import math
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pvae.builder import Objective
from pvae.evaluate import Estimate, estimate, evaluating, fixed_noise
from pvae.objectives import temper
from pvae.vae import VAE

TOLERANCE = 1e-4  # of (a), relative
STANDARD_ERRORS = 5.0  # of (b)
_PAIRS = 1000  # at least so many differences for (b)


class Check(NamedTuple):
    """`relative` difference of (a), None without a loss by hand; `kl_difference` of (b) in nats,
    None without analytic KL."""

    relative: float | None
    kl_difference: Estimate | None

    @property
    def agrees(self) -> bool:
        """Whether (a) lies within its tolerance; a NaN does not.

        >>> Check(math.nan, None).agrees
        False
        """
        return self.relative is None or self.relative <= TOLERANCE

    @property
    def suspicious(self) -> bool:
        """Whether (b) is further from zero than its standard error allows.

        >>> Check(0.0, Estimate(0.6, 0.1)).suspicious
        True
        """
        d = self.kl_difference
        return d is not None and abs(d.mean) > STANDARD_ERRORS * d.se

    def __str__(self) -> str:
        text = "(a) none" if self.relative is None else f"(a) {self.relative:.1e}"
        if self.kl_difference is None:
            return text
        return f"{text}  (b) {self.kl_difference.mean:+.3f} ± {self.kl_difference.se:.3f}"


class _Draws(Messenger):
    """Notes each draw of a latent that happens inside, by site, without changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        values = self.values.setdefault(msg["name"], [])
        # the model replays the guide's draw: the same tensor passes a second time
        if not any(msg["value"] is value for value in values):
            values.append(msg["value"])

    def stacked(self) -> dict[str, Tensor]:
        """By site, `(particles, B, D)`, vectorized or not."""
        stacked = {name: torch.stack(values) for name, values in self.values.items()}
        return {name: z.reshape(-1, *z.shape[-2:]) for name, z in stacked.items()}


def cross_check(
    svi: SVI,
    vae: VAE,
    objective: Objective,
    x: Tensor,
    y: Tensor | None = None,
    *,
    beta: float = 1.0,
    seed: int = 0,
) -> Check:
    """Holds `svi` against the hand-written ELBO of `vae` on one batch `(B, C, H, W)`.

    >>> import pyro, pvae
    >>> from pvae.builder import OBJECTIVES
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> objective = OBJECTIVES["trace_elbo"]
    >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), objective.elbo(1))
    >>> cross_check(svi, vae, objective, torch.ones(5, 1, 8, 8)).agrees
    True
    """
    with fixed_noise(x.device, seed), evaluating(vae):
        with temper(beta), _Draws() as draws:
            loss = svi.evaluate_loss(x, *(() if y is None else (y,)))
        terms = vae.terms(x, draws.stacked(), y)
        relative = None
        if objective.by_hand is not None:
            by_hand = objective.by_hand(terms, beta).item()
            relative = abs(loss - by_hand) / max(abs(by_hand), 1e-12)
        if terms.kl is None:
            return Check(relative, None)
        z = vae.encode(x, y).sample((math.ceil(_PAIRS / len(x)),))
        terms = vae.terms(x, dict.fromkeys(draws.values, z), y)
    assert terms.kl is not None
    return Check(relative, estimate((terms.kl_sampled - terms.kl).flatten()))
