"""What Pyro's objectives lack: tempering that may start at exactly zero, and the MMD."""

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor


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


def rbf(scale: float) -> Callable[[Tensor], Tensor]:
    """The kernel `k = exp(-d^2 / (2 scale^2))`, of squared distances `d^2`.

    >>> rbf(1.0)(torch.tensor([0.0, 2.0]))
    tensor([1.0000, 0.3679])
    """
    return lambda squared: (-squared / (2 * scale**2)).exp()


def inverse_multiquadric(scale: float) -> Callable[[Tensor], Tensor]:
    """The kernel `k = 1 / (1 + d^2 / scale^2)`, of squared distances `d^2`.

    Its tail is heavy, so that points far from all others still feel a gradient.
    Source: Wasserstein Auto-Encoders (2017), arXiv:1711.01558.

    >>> inverse_multiquadric(1.0)(torch.tensor([0.0, 3.0]))
    tensor([1.0000, 0.2500])
    """
    return lambda squared: 1 / (1 + squared / scale**2)


def mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    r"""The squared maximum mean discrepancy of two distributions, estimated without bias, `()`.

    `MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b)` over independent draws: 0 where the two
    distributions are one, else positive (for `rbf` and `inverse_multiquadric`). The estimate leaves
    out the pairs of a point with itself, so its mean is exact, and single values may be negative.
    Source: A Kernel Two-Sample Test (2012), JMLR 13, equation 3; as the regularizer of a VAE:
    InfoVAE (2017), arXiv:1706.02262.

    Args:
        a, b: draws `(N, D)` and `(M, D)`, two of each at least.
        kernel: from squared distances to similarities.

    Raises:
        ValueError: fewer than two draws, or events of two shapes.

    >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    >>> mmd(a, b, inverse_multiquadric(1.0))
    tensor(-0.1000)
    """
    for name, draws in (("a", a), ("b", b)):
        if draws.dim() != 2 or len(draws) < 2 or draws.shape[1] != a.shape[1]:
            raise ValueError(
                f"{name} must hold two draws (N, {a.shape[-1]}) or more, as a does, "
                f"not {tuple(draws.shape)}"
            )

    def similarity(u: Tensor, v: Tensor) -> Tensor:  # (N, M), differentiable where u meets v
        return kernel((u[:, None] - v).square().sum(-1))

    def within(u: Tensor) -> Tensor:
        k = similarity(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return within(a) + within(b) - 2 * similarity(a, b).mean()
