r"""Annealed importance sampling: `log p(x)` without trusting the guide.

Chains move from an initial `q0(z)`, the prior or the guide, to the posterior along

    log f_b(z) = (1 - b) log q0(z) + b log p(x, z),   b from 0 to 1,

by Hamiltonian Monte Carlo on all latents, all images and chains at once. The weights
`log w = sum_t (b_t - b_{t-1}) (log p(x, z_{t-1}) - log q0(z_{t-1}))` have `E[w] = p(x)`, so their
log-mean is a lower bound on `log p(x)` in expectation. Run backwards from an *exact* draw of the
posterior, `E[1/w] = 1/p(x)`: an upper bound. Such a draw is there for simulated data only, as
`z ~ p(z)`, `x ~ p(x|z)` is also `x ~ p(x)`, `z ~ p(z|x)`.

What it is not: the step sizes are adapted on the way, which the two equalities do not allow for;
it is usual, and its effect vanishes as the temperatures become many. And the sandwich on simulated
data says how far off the sampler is *there*; on real data there is only the lower bound.

Sources: Annealed importance sampling (1998), arXiv:physics/9803008; Sandwiching the marginal
likelihood using bidirectional Monte Carlo (2015), arXiv:1511.02543; On the quantitative analysis of
decoder-based generative models (2016), arXiv:1611.04273.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from tqdm import tqdm

from pvae.evaluate.bounds import Program, latents, sum_sites
from pvae.programs import evaluating

_ACCEPTED = 0.65  # the acceptance that the step sizes aim at
_RATE = 0.05  # how fast they do, in their logarithm
_FIRST_STEP = 0.1
_SIGMOID = 4.0  # temperatures are a sigmoid's values from -4 to 4: dense at both ends


class Annealed(NamedTuple):
    """`log_evidence` of each image `(B,)`, nats, and the mean `acceptance` of its HMC moves."""

    log_evidence: Tensor
    acceptance: Tensor


class Simulated(NamedTuple):
    """Images `x` drawn from the model, and the `latents` that made them: exact posterior draws."""

    x: Tensor
    latents: dict[str, Tensor]


class Sandwich(NamedTuple):
    """Bounds on `log p(x)` of the same simulated images, `(B,)` each, nats; in expectation
    `lower <= log p(x) <= upper`, so their mean difference bounds what the sampler lacks there."""

    lower: Tensor
    upper: Tensor


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
        self, model: Program, initial: Program | None, x: Tensor, y: Tensor | None, chains: int
    ) -> None:
        self.model, self.initial, self.x, self.y = model, initial, x, y
        self.shape = (chains, len(x))
        trace = self._trace(model if initial is None else initial, {})
        self.names = latents(trace)
        self.first: Any = {name: trace.nodes[name]["value"] for name in self.names}  # a draw of q0
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

    def _trace(self, program: Program, values: dict[str, Tensor]) -> Any:
        with pyro.plate("particles", self.shape[0], dim=-2):
            conditioned = poutine.condition(program, data=values)
            trace: Any = poutine.trace(conditioned).get_trace(self.x, self.y)
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
        self.accepted = torch.zeros_like(self.log_q0)

    def _at(self, z: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`log f_b`, its gradient, and the two log densities that it is made of."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_q0, log_joint = self.path(z)
            log_f = (1 - b) * log_q0 + b * log_joint
            (gradient,) = torch.autograd.grad(log_f.sum(), z)
        return log_f.detach(), gradient, log_q0.detach(), log_joint.detach()

    def move(self, b: float) -> None:
        """One HMC move that leaves f_b invariant; each chain accepts or stays for itself."""
        momentum = torch.randn_like(self.z)
        start, gradient, _, _ = self._at(self.z, b)
        step = self.step[..., None]
        z, p = self.z, momentum + step / 2 * gradient
        for i in range(self.leapfrogs):
            z = z + step * p
            end, gradient, log_q0, log_joint = self._at(z, b)
            p = p + (step if i < self.leapfrogs - 1 else step / 2) * gradient
        gain = end - start + (momentum.square() - p.square()).sum(-1) / 2
        probability = gain.exp().clamp(max=1).nan_to_num(0)  # a trajectory that left the floats
        accept = torch.rand_like(probability) < probability
        self.z = torch.where(accept[..., None], z, self.z)
        self.log_q0 = torch.where(accept, log_q0, self.log_q0)
        self.log_joint = torch.where(accept, log_joint, self.log_joint)
        self.step = self.step * (_RATE * (probability - _ACCEPTED)).exp()
        self.accepted = self.accepted + probability


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


def _check(num_chains: int, num_leapfrogs: int) -> None:
    for name, value in (("num_chains", num_chains), ("num_leapfrogs", num_leapfrogs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def annealed(
    model: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    initial: Program | None = None,
    num_temperatures: int = 500,
    num_chains: int = 4,
    num_leapfrogs: int = 10,
    title: str = "",
) -> Annealed:
    r"""A lower bound on `log p(x)` of each image of a batch by annealing, nats, in expectation.

    Args:
        model: a Pyro program `model(x, y)` whose sites all lie in one data plate.
        initial: the program of q0, such as the guide; None is the model's own prior, for which the
            guide plays no part at all.
        num_temperatures: steps from q0 to the joint; the bound tightens with them.
        num_chains: for each image; all run at once, so memory grows with them and with the batch.
        num_leapfrogs: gradients for each HMC move.
        title: of a progress bar; none without it.

    Raises:
        ValueError: a number below 1, or a latent that is not real-valued.

    Source: as this module.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> x = torch.ones(3, 1, 8, 8)
    >>> annealed(vae.model, x, initial=vae.guide, num_temperatures=5).log_evidence.shape
    torch.Size([3])
    """
    _check(num_chains, num_leapfrogs)
    betas = temperatures(num_temperatures).tolist()
    with evaluating(*_programs(model, initial)):
        path = _Path(model, initial, x, y, num_chains)
        chains = _Chains(path, path.pack(path.first), num_leapfrogs)
        log_w = _anneal(chains, betas, title)
    return _result(chains, log_w.logsumexp(0) - math.log(num_chains), num_temperatures)


def annealed_back(
    model: Program,
    simulated: Simulated,
    y: Tensor | None = None,
    *,
    initial: Program | None = None,
    num_temperatures: int = 500,
    num_chains: int = 4,
    num_leapfrogs: int = 10,
    title: str = "",
) -> Annealed:
    r"""An upper bound on `log p(x)` of simulated images, in expectation: annealing run backwards
    from the latents that made them. Arguments and errors as `annealed`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> made = simulate(vae.model, torch.ones(3, 1, 8, 8))
    >>> annealed_back(vae.model, made, num_temperatures=5).log_evidence.shape
    torch.Size([3])
    """
    _check(num_chains, num_leapfrogs)
    betas = temperatures(num_temperatures).flip(0).tolist()
    with evaluating(*_programs(model, initial)):
        path = _Path(model, initial, simulated.x, y, num_chains)
        chains = _Chains(path, path.pack(simulated.latents), num_leapfrogs)
        log_w = -_anneal(chains, betas, title)
    return _result(chains, math.log(num_chains) - (-log_w).logsumexp(0), num_temperatures)


def _programs(model: Program, initial: Program | None) -> list[Program]:
    return [model] if initial is None else [model, initial]


def _result(chains: _Chains, log_evidence: Tensor, num_temperatures: int) -> Annealed:
    return Annealed(log_evidence, chains.accepted.mean(0) / max(1, num_temperatures - 1))


def simulate(model: Program, x: Tensor, y: Tensor | None = None) -> Simulated:
    """As many images as `x` holds, drawn from the model with its labels `y`; `x` is not used else.

    Raises:
        ValueError: the model has not exactly one observed site.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> made = simulate(vae.model, torch.ones(3, 1, 8, 8))
    >>> made.x.shape, made.latents["z"].shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3, 2]))
    """
    with evaluating(model):
        trace: Any = poutine.trace(poutine.uncondition(model)).get_trace(x, y)
    drawn = latents(trace)
    observed = [name for name in drawn if trace.nodes[name]["infer"].get("was_observed")]
    if len(observed) != 1:
        raise ValueError(f"the model must have one observed site, not {observed}")
    values = {name: trace.nodes[name]["value"] for name in drawn}
    return Simulated(values.pop(observed[0]), values)


def bidirectional(
    model: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    initial: Program | None = None,
    num_temperatures: int = 500,
    num_chains: int = 4,
    num_leapfrogs: int = 10,
    title: str = "",
) -> Sandwich:
    """Bidirectional Monte Carlo: both bounds on as many simulated images as `x` holds, with its
    labels. Arguments and errors as `annealed` and `simulate`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> found = bidirectional(vae.model, torch.ones(3, 1, 8, 8), num_temperatures=50)
    >>> bool(found.lower.mean() < found.upper.mean() + 1)
    True
    """
    made = simulate(model, x, y)
    settings: Any = {
        "initial": initial,
        "num_temperatures": num_temperatures,
        "num_chains": num_chains,
        "num_leapfrogs": num_leapfrogs,
    }
    forward = annealed(model, made.x, y, **settings, title=title and f"{title}, forward")
    back = annealed_back(model, made, y, **settings, title=title and f"{title}, backward")
    return Sandwich(forward.log_evidence, back.log_evidence)
