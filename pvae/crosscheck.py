r"""The cross-check: what Pyro computes, held against the hand-written ELBO on a fixed batch.

(a) At the same noise, the loss of the very SVI object that trains against the loss by hand.
(b) `log q(z|x) - log p(z)` against the analytic KL, image by image: the mean of the differences
    is zero up to its standard error.
"""

import math
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.evaluate import Estimate, estimate, evaluating, fixed_noise
from pvae.objectives import temper
from pvae.vae import VAE, Objective

TOLERANCE = 1e-4  # of (a), relative
STANDARD_ERRORS = 5.0  # of (b)
_PAIRS = 1000  # at least so many differences for (b)


class Check(NamedTuple):
    """`relative` difference of (a); `kl_difference` of (b) in nats, None without analytic KL."""

    relative: float
    kl_difference: Estimate | None

    @property
    def agrees(self) -> bool:
        """Whether (a) lies within its tolerance; a NaN does not.

        >>> Check(math.nan, None).agrees
        False
        """
        return self.relative <= TOLERANCE

    @property
    def suspicious(self) -> bool:
        """Whether (b) is further from zero than its standard error allows.

        >>> Check(0.0, Estimate(0.6, 0.1)).suspicious
        True
        """
        d = self.kl_difference
        return d is not None and abs(d.mean) > STANDARD_ERRORS * d.se

    def __str__(self) -> str:
        text = f"(a) {self.relative:.1e}"
        if self.kl_difference is None:
            return text
        return f"{text}  (b) {self.kl_difference.mean:+.3f} ± {self.kl_difference.se:.3f}"


class _Draws(Messenger):
    """Notes each draw of the latent `z` that happens inside, without changing it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        # the model replays the guide's draw: the same tensor passes a second time
        if msg["name"] == "z" and not any(msg["value"] is value for value in self.values):
            self.values.append(msg["value"])


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
    >>> from pvae.vae import OBJECTIVES
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> objective = OBJECTIVES["trace_elbo"]
    >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), objective.elbo(1))
    >>> cross_check(svi, vae, objective, torch.ones(5, 1, 8, 8)).agrees
    True
    """
    with fixed_noise(x.device, seed), evaluating(vae):
        with temper(beta), _Draws() as draws:
            loss = svi.evaluate_loss(x, *(() if y is None else (y,)))
        z = torch.stack(draws.values)  # (particles, B, D), vectorized or not
        z = z.reshape(-1, *z.shape[-2:])
        by_hand = objective.by_hand(vae.terms(x, z, y), beta).item()

        q = vae.encode(x, y)
        terms = vae.terms(x, q.sample((math.ceil(_PAIRS / len(x)),)), y)
    relative = abs(loss - by_hand) / max(abs(by_hand), 1e-12)
    if terms.kl is None:
        return Check(relative, None)
    return Check(relative, estimate((terms.kl_sampled - terms.kl).flatten()))
