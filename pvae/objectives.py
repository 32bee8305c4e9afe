"""What Pyro's objectives lack: tempering that may start at exactly zero."""

from typing import Any

from pyro.poutine.messenger import Messenger


class temper(Messenger):
    r"""Weighs every latent site, in model and guide alike, by `beta`.

    `with temper(beta): svi.step(x)` optimizes `E_q[log p(x|z)] - beta KL(q(z|x) || p(z))`: the
    beta-VAE's objective, and KL warm-up, from exactly 0 (`pyro.poutine.scale` refuses 0).
    Source: beta-VAE (2017), openreview Sy2fzU9gl; KL annealing: Generating Sentences from a
    Continuous Space (2015), arXiv:1511.06349.

    Raises:
        ValueError: `beta` is negative or not finite.

    >>> temper(-1.0)
    Traceback (most recent call last):
    ValueError: beta must be a finite number of at least 0, not -1.0
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a finite number of at least 0, not {beta}")
        self.beta = beta

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta
