r"""The cross-check: compares Pyro's loss with the hand-written ELBO on a fixed batch.

(a) The loss of the SVI object that trains is compared with the same loss by hand, at the same
    noise. The exact type of the ELBO selects the formula; for an unknown type nothing is checked.
    The terms of the formula are the hand-written ones (`pvae.closed_form`) if the pair has them,
    else the densities of the pair's own distributions, without Pyro's handlers.
(b) `log q(z|x) - log p(z)` is compared with the analytic KL, image by image: the mean of the
    differences has to be zero, up to its standard error.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pvae import objectives
from pvae.closed_form import Terms
from pvae.evaluate import Estimate, estimate, fixed_noise
from pvae.kinds import Message
from pvae.objectives import temper
from pvae.programs import evaluating, optional
from pvae.vae import VAE

TOLERANCE = 1e-4  # of (a), relative
STANDARD_ERRORS = 5.0  # by which the mean in (b) may differ from zero
_PAIRS = 1000  # the least number of differences for (b)


# with what (a) compares the loss, in the words of the screen
FORMULAS = "the hand-written loss"
DENSITIES = "the pair's own densities"
NOTHING = "nothing: this objective has no loss by hand"
SHARED = "nothing: what is drawn once for all images has no loss by hand"


# ---- the loss of each ELBO by hand, from the terms `(particles, B)`, summed over images ----


def _sampled(elbo: Any, terms: Terms, beta: float) -> Tensor:
    return -terms.elbo_sampled(beta).mean(0).sum()


def _mean_field(elbo: Any, terms: Terms, beta: float) -> Tensor:
    return -(terms.elbo_sampled(beta) if terms.kl is None else terms.elbo(beta)).mean(0).sum()


def _renyi(elbo: Any, terms: Terms, beta: float) -> Tensor:
    log_weights = (1 - elbo.alpha) * terms.elbo_sampled(beta)
    return -(log_weights.logsumexp(0) - math.log(len(log_weights))).sum() / (1 - elbo.alpha)


def _free_bits(elbo: Any, terms: Terms, beta: float) -> Tensor:
    if terms.kl_by_unit is None:
        raise ValueError("free_bits needs the analytic KL of each latent unit, and there is none")
    batch = terms.reconstruction.shape[-1]
    kl = terms.kl_by_unit.mean(0).clamp(min=elbo.nats).sum()
    return batch * beta * kl - terms.reconstruction.mean(0).sum()


# by exact type: a subclass computes something else
_BY_HAND: Mapping[type, Callable[[Any, Terms, float], Tensor]] = {
    Trace_ELBO: _sampled,
    TraceGraph_ELBO: _sampled,
    TraceMeanField_ELBO: _mean_field,
    RenyiELBO: _renyi,
    objectives.MeanField: _mean_field,
    objectives.Renyi: _renyi,
    objectives.DReG: _renyi,
    objectives.FreeBits: _free_bits,
}


def objective_of(svi: SVI, beta: float) -> str:
    """Returns the name of the objective of `svi` at this weight of the KL, such as "ELBO".

    >>> import pyro
    >>> adam = pyro.optim.Adam({})
    >>> objective_of(SVI(print, print, adam, objectives.DReG(5)), 1.0)
    'DReG'
    >>> objective_of(SVI(print, print, adam, Trace_ELBO()), 4.0)
    'Trace_ELBO at beta = 4'
    """
    elbo = type(getattr(svi.loss, "__self__", None))
    if beta == 1 and _BY_HAND.get(elbo) in (_sampled, _mean_field):
        return "ELBO"
    return elbo.__name__ + ("" if beta == 1 else f" at beta = {beta:g}")


def by_hand(svi: SVI, latents: int = 1) -> Callable[[Terms, float], Tensor] | None:
    """Returns the loss of SVI's ELBO as a function of the terms and beta, or None.

    There is no such function for an unknown type, nor for an analytic KL if there are several
    latents: the KL of one depends on the draws of others.

    >>> import pyro
    >>> from pyro.infer import TraceTailAdaptive_ELBO
    >>> by_hand(SVI(print, print, pyro.optim.Adam({}), TraceTailAdaptive_ELBO(2))) is None
    True
    """
    elbo = getattr(svi.loss, "__self__", None)  # SVI keeps the method of its ELBO object
    formula = _BY_HAND.get(type(elbo))
    if formula is None or (formula in (_mean_field, _free_bits) and latents > 1):
        return None
    return partial(formula, elbo)


class Check(NamedTuple):
    """The results of the cross-check.

    `relative` is the relative difference in (a), None without a loss by hand. `kl_difference` is
    the mean difference in (b), in nats, None without an analytic KL. `against` says with what the
    loss was compared.
    """

    relative: float | None
    kl_difference: Estimate | None
    against: str = FORMULAS

    @property
    def agrees(self) -> bool:
        """Whether (a) is within `TOLERANCE` or was not computed; NaN is not within it.

        >>> Check(math.nan, None).agrees
        False
        """
        return self.relative is None or self.relative <= TOLERANCE

    @property
    def suspicious(self) -> bool:
        """Whether (b) is more than `STANDARD_ERRORS` standard errors away from zero.

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
        self.shared = False  # whether one was outside the data plate

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        self.shared |= not objectives.in_data_plate(msg)
        values = self.values.setdefault(msg["name"], [])
        # the model replays the guide's draw: the same tensor passes a second time
        if not any(msg["value"] is value for value in values):
            values.append(msg["value"])

    def stacked(self) -> dict[str, Tensor]:
        """Returns the draws by site, `(particles, B, D)`, of vectorized particles or others."""
        stacked = {name: torch.stack(values) for name, values in self.values.items()}
        return {name: z.reshape(-1, *z.shape[-2:]) for name, z in stacked.items()}


def cross_check(
    svi: SVI, vae: VAE, x: Tensor, y: Tensor | None = None, *, beta: float = 1.0, seed: int = 0
) -> Check:
    """Compares `svi` with the hand-written ELBO of `vae` on one batch `(B, C, H, W)`.

    `y` is as in `vae.given`, `beta` is the weight of the KL, and `seed` selects the noise.

    >>> import pyro, pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO())
    >>> check = cross_check(svi, vae, torch.ones(5, 1, 8, 8))
    >>> check.agrees, check.against
    (True, 'the hand-written loss')
    """
    y = vae.given(y)
    with fixed_noise(x.device, seed), evaluating(vae):
        try:
            with temper(beta), _Draws() as draws:
                loss = svi.evaluate_loss(x, *optional(y))
        except NotImplementedError:  # an ELBO that has gradients only
            return Check(None, None, NOTHING)
        if draws.shared:
            return Check(None, None, SHARED)
        terms = vae.terms(x, draws.stacked(), y)
        relative, against = None, NOTHING
        loss_by_hand = by_hand(svi, len(draws.values))
        if loss_by_hand is not None:
            expected = loss_by_hand(terms, beta).item()
            relative = abs(loss - expected) / max(abs(expected), 1e-12)
            against = DENSITIES if vae.oracle is None else FORMULAS
        if terms.kl is None:
            return Check(relative, None, against)
        z = vae.encode(x, y).sample((math.ceil(_PAIRS / len(x)),))
        terms = vae.terms(x, dict.fromkeys(draws.values, z), y)
    assert terms.kl is not None
    return Check(relative, estimate((terms.kl_sampled - terms.kl).flatten()), against)
