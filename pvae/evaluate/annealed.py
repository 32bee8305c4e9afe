r"""Annealed importance sampling: `log p(x)` without trusting the guide.

Chains move from an initial `q0(z)`, the prior or the guide, to the posterior along

    log f_b(z) = (1 - b) log q0(z) + b log p(x, z),   b from 0 to 1,

by Hamiltonian Monte Carlo on all latents, all images and chains at once. The weights
`log w = sum_t (b_t - b_{t-1}) (log p(x, z_{t-1}) - log q0(z_{t-1}))` have `E[w] = p(x)`, so their
log-mean is a lower bound on `log p(x)` in expectation. Chains that run backwards, from an *exact*
draw of the posterior, have `E[1/w] = 1/p(x)`, which gives an upper bound. Such a draw exists for
simulated data only: `z ~ p(z)`, `x ~ p(x|z)` has the same law as `x ~ p(x)`, `z ~ p(z|x)`.

There are two limits. First, the step sizes are adapted during the run, but the two equalities are
exact for fixed step sizes only; this is usual, and the effect vanishes with many temperatures.
Second, the sandwich of both bounds shows the sampler's error on *simulated* data; on real data
there is only the lower bound.

Sources: Annealed importance sampling (1998), arXiv:physics/9803008; Sandwiching the marginal
likelihood using bidirectional Monte Carlo (2015), arXiv:1511.02543; On the quantitative analysis of
decoder-based generative models (2016), arXiv:1611.04273.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from tqdm import tqdm

from pvae.evaluate.bounds import sum_sites
from pvae.kinds import Fn, Trace
from pvae.objectives import latent_names
from pvae.programs import evaluating

_ACCEPTED = 0.65  # the acceptance probability that the step sizes are adapted to
_RATE = 0.05  # how fast the logarithm of a step size is adapted
_FIRST_STEP = 0.1
_SIGMOID = 4.0  # temperatures are a sigmoid's values from -4 to 4: dense at both ends


class Annealed(NamedTuple):
    """The result of annealing for each image, `(B,)` each.

    `log_evidence` is the bound, in nats; `acceptance` is the mean acceptance probability of the HMC
    moves; `diverged` is the share of moves that end at an energy that is not finite. Such a move
    leaves the chain where it was: the bound holds, but more divergent moves make it looser.
    """

    log_evidence: Tensor
    acceptance: Tensor
    diverged: Tensor


class Simulated(NamedTuple):
    """Images `x` drawn from the model, and the `latents` that made them: exact posterior draws."""

    x: Tensor
    latents: dict[str, Tensor]


class Sandwich(NamedTuple):
    """Two bounds on `log p(x)` of the same simulated images, `(B,)` each, in nats.

    In expectation `lower <= log p(x) <= upper`, so the sampler's error is at most the mean of
    `upper - lower`. `diverged` is the share of divergent HMC moves in both directions.
    """

    lower: Tensor
    upper: Tensor
    diverged: Tensor


def temperatures(count: int) -> Tensor:
    """`count + 1` values of b from 0 to 1, on a sigmoid.

    >>> [round(b, 2) for b in temperatures(4).tolist()]
    [0.0, 0.1, 0.5, 0.9, 1.0]
    """
    if count < 1:
        raise ValueError(f"num_temperatures must be at least 1, not {count}")
    b = torch.linspace(-_SIGMOID, _SIGMOID, count + 1, dtype=torch.float64).sigmoid()
    return (b - b[0]) / (b[-1] - b[0])


class _Path:
    """`log q0(z)` and `log p(x, z)` of a batch, as functions of all latents packed, `(K, B, D)`."""

    def __init__(
        self, model: Fn, initial: Fn | None, x: Tensor, y: Tensor | None, chains: int
    ) -> None:
        self.model, self.initial, self.x, self.y = model, initial, x, y
        self.shape = (chains, len(x))
        trace = self._trace(model if initial is None else initial, {})
        self.names = latent_names(trace)
        # a draw of q0
        self.first: dict[str, Tensor] = {name: trace.nodes[name]["value"] for name in self.names}
        for name in self.names:
            _check_unbounded(name, trace.nodes[name]["fn"].support)

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """From `(K, B, *event)` or `(B, *event)` of each site to `(K, B, D)`."""
        flat = [
            values[name].expand_as(self.first[name]).reshape(*self.shape, -1) for name in self.names
        ]
        return torch.cat(flat, dim=-1)

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        sizes = [self.first[name][0, 0].numel() for name in self.names]
        parts = zip(self.names, z.split(sizes, dim=-1), strict=True)
        return {name: part.reshape(self.first[name].shape) for name, part in parts}

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`log q0(z)` and `log p(x, z)`, each `(K, B)`."""
        values = self.unpack(z)
        model = self._trace(self.model, values)
        observed = [name for name in model.observation_nodes if name not in values]
        log_prior = sum_sites(model, self.names, self.shape)
        log_joint = log_prior + sum_sites(model, observed, self.shape)
        if self.initial is None:
            return log_prior, log_joint
        return sum_sites(self._trace(self.initial, values), self.names, self.shape), log_joint

    def _trace(self, program: Fn, values: dict[str, Tensor]) -> Any:
        with pyro.plate("particles", self.shape[0], dim=-2):
            conditioned = poutine.condition(program, data=values)
            trace: Trace = poutine.trace(conditioned).get_trace(self.x, self.y)
        trace.compute_log_prob()
        return trace


def _check_unbounded(name: str, support: Any) -> None:
    support = getattr(support, "base_constraint", support)
    if support not in (constraints.real, constraints.real_vector):
        raise ValueError(
            f"site {name!r} has the support {support}: Hamiltonian Monte Carlo moves latents on "
            "the real line only"
        )


class _Chains:
    """The state of all chains: `z` `(K, B, D)`, and at it `log q0` and `log p(x, z)`."""

    def __init__(self, path: _Path, z: Tensor, leapfrogs: int) -> None:
        self.path, self.z, self.leapfrogs = path, z, leapfrogs
        self.log_q0, self.log_joint = path(z)
        self.step = torch.full_like(self.log_q0, _FIRST_STEP)  # one for each chain
        self.accepted = torch.zeros_like(self.log_q0)  # sums over the moves so far
        self.diverged = torch.zeros_like(self.log_q0)

    def _at(self, z: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`log f_b`, its gradient, and the two log densities that it is made of."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_q0, log_joint = self.path(z)
            log_f = (1 - b) * log_q0 + b * log_joint
            (gradient,) = torch.autograd.grad(log_f.sum(), z)
        return log_f.detach(), gradient, log_q0.detach(), log_joint.detach()

    def move(self, b: float) -> None:
        """One HMC move that leaves f_b invariant; each chain accepts or rejects for itself.

        A chain whose trajectory diverges, to an energy that is not finite, stays where it was.
        """
        momentum, half = torch.randn_like(self.z), self.step[..., None] / 2
        # no validation: a divergent chain may have NaN as latents and parameters of distributions
        with pyro.validation_enabled(False):
            start, gradient, log_q0, log_joint = self._at(self.z, b)
            z, p, end = self.z, momentum, start
            for _ in range(self.leapfrogs):
                p = p + half * gradient
                z = z + 2 * half * p
                end, gradient, log_q0, log_joint = self._at(z, b)
                p = p + half * gradient
        energy = p.square().sum(-1) / 2
        finite = end.isfinite() & energy.isfinite()
        gain = end - start + momentum.square().sum(-1) / 2 - energy
        probability = gain.exp().clamp(max=1).where(finite, 0)
        accept = torch.rand_like(probability) < probability
        self.z = torch.where(accept[..., None], z, self.z)
        self.log_q0 = torch.where(accept, log_q0, self.log_q0)
        self.log_joint = torch.where(accept, log_joint, self.log_joint)
        self.step = self.step * (_RATE * (probability - _ACCEPTED)).exp()
        self.accepted = self.accepted + probability
        self.diverged = self.diverged + ~finite


def _anneal(chains: _Chains, betas: list[float], title: str) -> Tensor:
    """`sum_t (b_t - b_{t-1}) (log p(x, z) - log q0(z))` along `betas`, up or down, `(K, B)`."""
    log_w = torch.zeros_like(chains.log_q0)
    steps = list(pairwise(betas))
    # disable=None: no bar where the output is not a terminal
    bar = tqdm(steps, title, leave=False, disable=None if title else True)
    for number, (b, after) in enumerate(bar, start=1):
        log_w = log_w + (after - b) * (chains.log_joint - chains.log_q0)
        if number < len(steps):  # after the last weight the chains are not used any more
            chains.move(after)
    return log_w


def simulate(model: Fn, x: Tensor, y: Tensor | None = None) -> Simulated:
    """Draws `len(x)` images from the model, given the labels `y`; the pixels of `x` are not used.

    Raises:
        ValueError: the model has not exactly one observed site.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> made = simulate(vae.model, torch.ones(3, 1, 8, 8))
    >>> made.x.shape, made.latents["z"].shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3, 2]))
    """
    with evaluating(model):
        trace: Trace = poutine.trace(poutine.uncondition(model)).get_trace(x, y)
    drawn = latent_names(trace)
    observed = [name for name in drawn if trace.nodes[name]["infer"].get("was_observed")]
    if len(observed) != 1:
        raise ValueError(f"the model must have one observed site, not {observed}")
    values = {name: trace.nodes[name]["value"] for name in drawn}
    return Simulated(values.pop(observed[0]), values)


@dataclass(frozen=True)
class Annealer:
    r"""Annealed importance sampling for a batch of images.

    Call it with `x` `(B, C, H, W)` (and `y`): it returns for each image a lower bound on `log p(x)`
    in expectation, in nats.

    Args:
        model: a Pyro program `model(x, y)` whose sites are all in one data plate.
        initial: the program of q0, such as the guide. None takes the model's own prior; the guide
            is then not used.
        num_temperatures: steps from q0 to the joint; more steps make the bound tighter.
        num_chains: chains for each image. All run at once, so memory grows with their number and
            with the batch.
        num_leapfrogs: leapfrog steps of each HMC move.
        title: the title of the progress bar; without a title there is no bar.

    Raises:
        ValueError: a number is below 1, or a latent is not real-valued.

    Sources: those of this module.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> anneal = Annealer(vae.model, vae.guide, num_temperatures=50)
    >>> anneal(torch.ones(3, 1, 8, 8)).log_evidence.shape
    torch.Size([3])
    """

    model: Fn
    initial: Fn | None = None
    num_temperatures: int = 500
    num_chains: int = 4
    num_leapfrogs: int = 10
    title: str = ""

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_leapfrogs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Annealed:
        return self._run(x, y, None, self.title)

    def back(self, simulated: Simulated, y: Tensor | None = None) -> Annealed:
        """An upper bound on `log p(x)` of simulated images, in expectation: chains run backwards
        from the latents that made the images.

        >>> import pvae
        >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
        >>> made = simulate(vae.model, torch.ones(3, 1, 8, 8))
        >>> Annealer(vae.model, num_temperatures=5).back(made).log_evidence.shape
        torch.Size([3])
        """
        return self._run(simulated.x, y, simulated.latents, self.title)

    def sandwich(self, x: Tensor, y: Tensor | None = None) -> Sandwich:
        """Bidirectional Monte Carlo: both bounds on `len(x)` simulated images with the labels `y`.

        Raises the errors of `simulate`.

        >>> import pvae
        >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
        >>> found = Annealer(vae.model, num_temperatures=50).sandwich(torch.ones(3, 1, 8, 8))
        >>> bool(found.lower.mean() < found.upper.mean() + 1)
        True
        """
        made = simulate(self.model, x, y)
        forward = self._run(made.x, y, None, self.title and f"{self.title}, forward")
        back = self._run(made.x, y, made.latents, self.title and f"{self.title}, backward")
        diverged = (forward.diverged + back.diverged) / 2
        return Sandwich(forward.log_evidence, back.log_evidence, diverged)

    def _run(
        self, x: Tensor, y: Tensor | None, exact: dict[str, Tensor] | None, title: str
    ) -> Annealed:
        """Anneals from draws of q0, or backwards from `exact` draws of the posterior if given."""
        betas = temperatures(self.num_temperatures).tolist()
        with evaluating(self.model, self.model if self.initial is None else self.initial):
            path = _Path(self.model, self.initial, x, y, self.num_chains)
            start = path.pack(path.first if exact is None else exact)
            chains = _Chains(path, start, self.num_leapfrogs)
            log_w = _anneal(chains, betas if exact is None else betas[::-1], title)
        log_mean = log_w.logsumexp(0) - math.log(self.num_chains)
        shares = torch.stack([chains.accepted, chains.diverged]).mean(1) / max(1, len(betas) - 2)
        return Annealed(log_mean if exact is None else -log_mean, *shares)
