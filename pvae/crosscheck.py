r"""The cross-check: what Pyro computes, held against the hand-written ELBO on a fixed batch.

(a) At the same noise, the loss of the very SVI object that trains against the same loss by hand.
    The formula follows from the exact type of its ELBO; of another type, nothing is checked. Its
    terms are the hand-written ones (`pvae.closed_form`) where the pair has them, else the
    densities of the pair's own distributions, without Pyro's handlers.
(b) `log q(z|x) - log p(z)` against the analytic KL, image by image: the mean of the differences
    is zero up to its standard error.
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
STANDARD_ERRORS = 5.0  # of (b)
_PAIRS = 1000  # at least so many differences for (b)


# what (a) is held against, in the words of the screen
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
    """What `svi` maximizes at this weight of the KL, in a word: "ELBO", or the name of another.

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
    """The loss of SVI's ELBO as a function of the terms and beta; None for an unknown type, and for
    the analytic KLs of several latents, each at the draws of others.

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
    """`relative` difference of (a), None without a loss by hand; `kl_difference` of (b) in nats,
    None without analytic KL; `against` says what the loss was held against."""

    relative: float | None
    kl_difference: Estimate | None
    against: str = FORMULAS

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
        """By site, `(particles, B, D)`, vectorized or not."""
        stacked = {name: torch.stack(values) for name, values in self.values.items()}
        return {name: z.reshape(-1, *z.shape[-2:]) for name, z in stacked.items()}


def cross_check(
    svi: SVI, vae: VAE, x: Tensor, y: Tensor | None = None, *, beta: float = 1.0, seed: int = 0
) -> Check:
    """Holds `svi` against the hand-written ELBO of `vae` on one batch `(B, C, H, W)`.

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
