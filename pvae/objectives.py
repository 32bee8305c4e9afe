"""The objectives that Pyro does not have.

These are tempering that may start at exactly zero; a mean-field ELBO that refuses pairs on which it
would be wrong; the importance-weighted bounds as differentiable losses, with the
doubly-reparameterized gradient; free bits; and the MMD in place of the KL. Each objective is a
`pyro.infer.ELBO`: `SVI` takes it, and `objective(model, guide)` makes a loss for a training loop in
torch. Losses are summed over images, in nats.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import Independent

from pvae.kinds import Distribution, Fn, Message, Trace


class temper(Messenger):
    r"""Multiplies the log densities of all latent sites, or of the site named `site`, by `beta`.

    It does so in model and guide: `with temper(beta): svi.step(x)` optimizes
    `E_q[log p(x|z)] - beta KL(q(z|x) || p(z))`, the objective of the beta-VAE and of KL warm-up
    from exactly 0 (`pyro.poutine.scale` refuses 0). `temper(beta, "z2")` weighs one latent layer;
    if no latent has the name, nothing changes.
    Source: beta-VAE (2017), openreview Sy2fzU9gl; KL annealing: Generating Sentences from a
    Continuous Space (2015), arXiv:1511.06349.

    Raises:
        ValueError: `beta` is negative or not finite.

    >>> temper(-1.0)
    Traceback (most recent call last):
    ValueError: beta must be a finite number of at least 0, not -1.0
    """

    def __init__(self, beta: float, site: str | None = None) -> None:
        super().__init__()
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a finite number of at least 0, not {beta}")
        self.beta = float(beta)  # captured.SVI treats a float as an input, an int as a constant
        self.site = site

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and self.site in (None, msg["name"]):
            msg["scale"] = msg["scale"] * self.beta


class part_of_batch(Messenger):
    r"""Makes the losses of the parts of a batch add up to the loss of the whole batch.

    `with part_of_batch(share): svi.step(part)`, with `share = len(part) / len(batch)`, multiplies
    the log densities of two kinds of sites by the share. Sites outside the data plate (the last
    batch dimension), such as the weights of a Bayesian decoder, are then counted once, not once for
    each part. Sites in a data plate that is a subsample of N images then stand for N images in all
    parts together, not in each part. With several processes each process takes one part,
    `share = len(x) / processes.total(len(x))`.

    Raises:
        ValueError: `share` is not above 0 and at most 1.

    >>> part_of_batch(2.0)
    Traceback (most recent call last):
    ValueError: share must be above 0 and at most 1, not 2.0
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {share}")
        self.share = float(share)  # captured.SVI treats a float as an input, an int as a constant

    def _pyro_sample(self, msg: Message) -> None:
        plates = [frame for frame in msg["cond_indep_stack"] if frame.dim == -1]
        if all(frame.full_size not in (None, frame.size) for frame in plates):
            msg["scale"] = msg["scale"] * self.share


def inverse_multiquadric(scale: float) -> Callable[[Tensor], Tensor]:
    """Returns the kernel `k = 1 / (1 + d^2 / scale^2)` as a function of squared distances `d^2`.

    Its tail is heavy, so that points far from all others still get a gradient.
    Source: Wasserstein Auto-Encoders (2017), arXiv:1711.01558.

    >>> inverse_multiquadric(1.0)(torch.tensor([0.0, 3.0]))
    tensor([1.0000, 0.2500])
    """
    return lambda squared: 1 / (1 + squared / scale**2)


def mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    r"""The squared maximum mean discrepancy of two distributions, estimated without bias, `()`.

    `MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b)` over independent draws: 0 where the two
    distributions are equal, else positive (for `inverse_multiquadric`). The estimate leaves out
    the pairs of a draw with itself, so its mean is exact, and single values may be negative.
    Source: A Kernel Two-Sample Test (2012), JMLR 13, equation 3; as the regularizer of a VAE:
    InfoVAE (2017), arXiv:1706.02262.

    Args:
        a, b: draws `(N, D)` and `(M, D)`, at least two of each.
        kernel: from squared distances to similarities.

    Raises:
        ValueError: there are fewer than two draws, or `a` and `b` differ in `D`.

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

    def similarity(u: Tensor, v: Tensor) -> Tensor:  # (N, M), differentiable even where u equals v
        return kernel((u[:, None] - v).square().sum(-1))

    def within(u: Tensor) -> Tensor:
        k = similarity(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return within(a) + within(b) - 2 * similarity(a, b).mean()


# Particles are one more leading dimension. max_plate_nesting is given, because an objective that
# must guess it draws random numbers on its first call
_VECTORIZED: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}


# ---- what the objectives below read from Pyro's traces ----


def in_data_plate(site: Message) -> bool:
    """Whether a site has a value for each image: it is in the plate of the last dimension."""
    return any(frame.dim == -1 for frame in site["cond_indep_stack"])


def latent_names(trace: Trace) -> list[str]:
    """The names of the unobserved sample sites, without the sites of plates."""
    return [n for n in trace.stochastic_nodes if not site_is_subsample(trace.nodes[n])]


def _log_density(trace: Trace) -> Tensor:
    """The log density of all sample sites for each particle and image, `(P, B)` or `(B,)`.

    Raises:
        ValueError: a site is outside the data plate, or in a subsampled plate: the plate's scale
            would enter the logarithm of the mean weight.
    """
    total: Any = 0.0
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not in_data_plate(site):
            raise ValueError(
                f"site {name!r} is outside the data plate (dim -1): it has no bound for each image"
            )
        if any(f.full_size not in (None, f.size) for f in site["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r} lies in a subsampled plate: give the plate the batch's size"
            )
        total = total + site["log_prob"]
    return total


def kl_by_unit(q: Distribution, p: Distribution) -> Tensor | None:
    """The analytic KL of each latent unit, `(*, D)`; None unless both distributions factorize over
    units and torch has the formula.

    >>> from torch.distributions import Independent, Normal
    >>> kl_by_unit(
    ...     Independent(Normal(torch.ones(2), 1.0), 1), Independent(Normal(torch.zeros(2), 1.0), 1)
    ... )
    tensor([0.5000, 0.5000])
    """
    if not all(isinstance(d, Independent) and d.reinterpreted_batch_ndims == 1 for d in (q, p)):
        return None
    try:
        return torch.distributions.kl_divergence(q.base_dist, p.base_dist)  # type: ignore[attr-defined]
    except NotImplementedError:
        return None


class MeanField(TraceMeanField_ELBO):
    """Pyro's `TraceMeanField_ELBO` with an error for pairs on which it would be wrong.

    It computes the KL site by site. If model and guide draw their latents in different orders, as
    with `HierarchicalGuide`, the KL of one site depends on the draw of another, over which it
    should be averaged; Pyro only warns.

    Raises:
        ValueError: model and guide draw their latents in different orders, or draws are not
            reparameterized.

    >>> MeanField().num_particles
    1
    """

    def _get_trace(self, model: Fn, guide: Fn, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        with warnings.catch_warnings():
            # Pyro's own warning, which it gives only with validation on
            warnings.filterwarnings("ignore", message="Failed to verify mean field restriction")
            model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _require_reparameterized(guide_trace, "TraceMeanField_ELBO")
        _require_same_order(model_trace, guide_trace, "TraceMeanField_ELBO")
        return model_trace, guide_trace


def _require_same_order(model_trace: Trace, guide_trace: Trace, what: str) -> None:
    """Raises `ValueError` if model and guide draw their latents in different orders."""
    in_guide = latent_names(guide_trace)
    in_model = [name for name in latent_names(model_trace) if name in in_guide]
    if in_model != in_guide:
        raise ValueError(
            f"{what} would be wrong here: the model draws its latents in the order "
            f"{', '.join(in_model)}, the guide in the order {', '.join(in_guide)}, so that "
            "a KL taken at one site depends on the draw of another. Use Trace_ELBO"
        )


class _Differentiable(Trace_ELBO):
    """Base of the objectives that define `differentiable_loss`; other methods follow from it.

    Particles are one more leading dimension, outside the data plate, which is the only plate.
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(num_particles, **_VECTORIZED)

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


def _require_reparameterized(trace: Trace, what: str) -> None:
    for name in latent_names(trace):
        if not trace.nodes[name]["fn"].has_rsample:
            raise ValueError(
                f"{what} needs reparameterized draws, but the guide's site {name!r} has none "
                "(has_rsample is False)"
            )


class Renyi(RenyiELBO):
    r"""Pyro's `RenyiELBO`, also as a differentiable loss, so that `Renyi(...)(model, guide)` works.

    `L_a(x) = 1 / (1 - a) log 1/K sum_k w_k^(1 - a)`, `w_k = p(x, z_k) / q(z_k|x)`; `a = 0` is the
    importance-weighted bound (IWAE), `a -> 1` the ELBO. Draws must be reparameterized: for
    other draws Pyro gives the guide a gradient of 0 at `a = 0`, without a warning.
    Sources: Importance Weighted Autoencoders (2015), arXiv:1509.00519; Renyi Divergence Variational
    Inference (2016), arXiv:1602.02311.

    Raises:
        ValueError: draws are not reparameterized; in the differentiable loss also, a site is
            outside the data plate or in a subsampled plate.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> bound = Renyi(0, 5, vectorize_particles=True, max_plate_nesting=1)(vae.model, vae.guide)
    >>> bound(torch.ones(4, 1, 8, 8)).requires_grad
    True
    """

    def _get_trace(self, model: Fn, guide: Fn, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _require_reparameterized(guide_trace, "this objective")
        return model_trace, guide_trace

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        particles = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            particles.append(_log_density(model_trace) - _log_density(guide_trace))
        vectorized = self.vectorize_particles and self.num_particles > 1
        log_weights = particles[0] if vectorized else torch.stack(particles)  # (K, B)
        loss = -_log_mean_exp((1 - self.alpha) * log_weights).sum() / (1 - self.alpha)
        warn_if_nan(loss, "loss")
        return loss


def _log_mean_exp(v: Tensor) -> Tensor:
    return v.logsumexp(0) - math.log(len(v))


class _Leaves(Messenger):
    """Replaces each draw of a guide by a new leaf of autograd, and keeps the draw itself, which is
    a function of the guide's parameters and of the earlier leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not msg["fn"].has_rsample:
            return
        self.drawn[msg["name"]] = msg["value"]
        msg["value"] = msg["value"].detach().requires_grad_()


class DReG(Renyi):
    r"""The importance-weighted bound with the doubly-reparameterized gradient of the guide.

    With `v_k` the normalized weights, the guide's gradient is `sum_k v_k^2 dlog w_k/dz_k
    dz_k/dphi`: the same in expectation as IWAE's, without the term whose noise dominates as K
    grows. The model's gradient is that of the bound, `sum_k v_k dlog p(x, z_k)/dtheta`.
    Source: Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (2018),
    arXiv:1810.04152.

    Args:
        num_particles: `K`; with 1 it is "sticking the landing" (arXiv:1703.09194).

    Raises:
        ValueError: as in the differentiable loss of `Renyi`.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> DReG(5).loss_and_grads(vae.model, vae.guide, torch.ones(4, 1, 8, 8)) > 0
    True
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(0, num_particles, **_VECTORIZED)

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        model, guide = map(self._vectorized_num_particles, (model, guide))
        # the guide runs once, so log q is taken under the dropout mask of the draw
        with _Leaves() as leaves:
            guide_trace: Trace = poutine.trace(guide).get_trace(*args, **kwargs)
        _require_reparameterized(guide_trace, "the doubly-reparameterized gradient")
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace: Trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        log_p = _log_density(model_trace)  # (K, B)
        log_weights = log_p - _log_density(guide_trace)
        if self.num_particles == 1:
            log_weights, log_p = log_weights[None], log_p[None]
        v = log_weights.detach().softmax(0)
        bound = _log_mean_exp(log_weights.detach()).sum()

        z = {name: guide_trace.nodes[name]["value"] for name in leaves.drawn}  # each (K, B, D)
        by_z = torch.autograd.grad((v * log_weights).sum(), list(z.values()), retain_graph=True)
        gradients = {
            name: v.reshape(*leaf.shape[:-1], 1) * gradient
            for (name, leaf), gradient in zip(z.items(), by_z, strict=True)
        }
        surrogate = (v * log_p).sum()
        for name in reversed(leaves.drawn):  # from the last layer drawn to the first
            draw, gradient = leaves.drawn[name], gradients.pop(name)
            surrogate = surrogate + (gradient * draw).sum()
            if gradients:  # the draw also depends on the layers drawn before it
                before = [z[other] for other in gradients]
                parts = torch.autograd.grad(
                    draw, before, gradient, retain_graph=True, materialize_grads=True
                )
                for other, part in zip(gradients, parts, strict=True):
                    gradients[other] = gradients[other] + part
        return -(bound + surrogate - surrogate.detach())

    loss_and_grads = _Differentiable.loss_and_grads


class FreeBits(_Differentiable):
    r"""The ELBO with a floor of `nats` for each latent unit's KL, averaged over the batch.

    `sum_b E_q[log p(x_b|z)] - B sum_d max(nats, mean_b KL_d(x_b))`, with analytic KLs: below the
    floor a unit's KL has no gradient, so that the KL does not switch off a unit before it is used.
    The objective is at most the ELBO; to judge a model, use the ELBO. With several layers each unit
    of each layer has the floor, and its KL is taken at the draws of the layers above.
    Source: Improved Variational Inference with Inverse Autoregressive Flow (2016),
    arXiv:1606.04934, section 5.2 and appendix C.8.

    Args:
        nats: the floor of each unit.
        num_particles: draws of each posterior.

    Raises:
        ValueError: `nats` is negative; the posterior or prior of a latent does not factorize over
            units, or their KL is not analytic; model and guide draw the latents in different
            orders; draws are not reparameterized.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> FreeBits(0.5).loss(vae.model, vae.guide, torch.ones(4, 1, 8, 8)) > 0
    True
    """

    sums_over_images = False  # the floor is on the mean of a batch

    def __init__(self, nats: float, num_particles: int = 1) -> None:
        if not nats >= 0:
            raise ValueError(f"nats must be at least 0, not {nats}")
        super().__init__(num_particles)
        self.nats = nats

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        _require_reparameterized(guide_trace, "free bits")
        _require_same_order(model_trace, guide_trace, "free bits")
        loss = -_observed(model_trace) / self.num_particles
        for name in latent_names(guide_trace):
            q, p = guide_trace.nodes[name], model_trace.nodes[name]
            units = kl_by_unit(q["fn"], p["fn"])
            if units is None:
                raise ValueError(
                    "free bits needs a posterior and a prior that factorize over the latent's "
                    "units, with an analytic KL, not "
                    f"{type(q['fn']).__name__} and {type(p['fn']).__name__}"
                )
            kl = units.flatten(0, -2).mean(0).clamp(min=self.nats).sum()
            loss = loss + q["scale"] * units.shape[-2] * kl
        warn_if_nan(loss, "loss")
        return loss


def _the_latent(model_trace: Trace, guide_trace: Trace, what: str) -> tuple[Any, Any]:
    """The site of the only latent, in the guide and in the model."""
    names = latent_names(guide_trace)
    if len(names) != 1:
        raise ValueError(f"{what} is for one latent site, not for {', '.join(names)}")
    return guide_trace.nodes[names[0]], model_trace.nodes[names[0]]


def _observed(trace: Trace) -> Tensor:
    return sum(trace.nodes[name]["log_prob_sum"] for name in trace.observation_nodes)


class InfoVAE(_Differentiable):
    r"""The ELBO with a weighted KL, and the MMD from the batch's aggregate posterior to the prior.

    `sum_b E_q[log p(x_b|z)] - kl_weight sum_b KL(q(z|x_b) || p(z)) - mmd_weight B MMD^2(q(z),
    p(z))`. With `kl_weight = 0` this is the MMD-VAE (a Wasserstein autoencoder with random codes);
    a learned prior is then not trained, because only the KL gives it a gradient. The KL is sampled;
    the kernel is the inverse multiquadric of scale `sqrt(2 D)`. The objective is no bound on
    `log p(x)`.
    Sources: InfoVAE (2017), arXiv:1706.02262; Wasserstein Auto-Encoders (2017), arXiv:1711.01558.

    Args:
        num_particles: draws of each posterior.
        mmd_weight, kl_weight: the weights of the MMD and of the KL, for each image.

    Raises:
        ValueError: a weight is negative, there are several latents, or draws are not
            reparameterized.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> InfoVAE().loss(vae.model, vae.guide, torch.ones(4, 1, 8, 8)) > 0
    True
    """

    sums_over_images = False  # the MMD is that of a batch

    def __init__(
        self, num_particles: int = 1, *, mmd_weight: float = 100.0, kl_weight: float = 0.1
    ) -> None:
        for name, weight in (("mmd_weight", mmd_weight), ("kl_weight", kl_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, not {weight}")
        super().__init__(num_particles)
        self.mmd_weight, self.kl_weight = mmd_weight, kl_weight

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        _require_reparameterized(guide_trace, "InfoVAE")
        q, p = _the_latent(model_trace, guide_trace, "InfoVAE")
        kl = (q["log_prob_sum"] - p["log_prob_sum"]) / self.num_particles
        reconstruction = _observed(model_trace) / self.num_particles
        a = q["value"].flatten(0, -2)  # (K B, D), draws of the aggregate posterior
        distance = a.new_zeros(())
        if len(a) > 1:  # the estimate needs two draws
            b = p["fn"].sample().flatten(0, -2)
            distance = mmd(a, b, inverse_multiquadric(math.sqrt(2 * a.shape[1])))
        batch = q["value"].shape[-2]
        regularizer = self.kl_weight * kl + self.mmd_weight * batch * q["scale"] * distance
        loss = regularizer - reconstruction
        warn_if_nan(loss, "loss")
        return loss


# ---- by name ----


class Objective(NamedTuple):
    """A named objective: `elbo(num_particles)` makes it."""

    elbo: Callable[[int], ELBO]
    label: str
    min_particles: int = 1


#: The objectives, by name.
OBJECTIVES: Mapping[str, Objective] = {
    "trace_elbo": Objective(
        lambda particles: Trace_ELBO(particles, **_VECTORIZED), "the ELBO, its KL sampled"
    ),
    "trace_mean_field_elbo": Objective(
        lambda particles: MeanField(particles, **_VECTORIZED),
        "the ELBO, its KL analytic where it exists",
    ),
    "trace_graph_elbo": Objective(
        # its baselines are for one particle at a time
        lambda particles: TraceGraph_ELBO(particles, max_plate_nesting=1),
        "the ELBO, score-function gradients with baselines",
    ),
    "iwae": Objective(
        lambda particles: Renyi(0, particles, **_VECTORIZED),
        "the importance-weighted bound over the particles",
        min_particles=2,
    ),
    "dreg": Objective(DReG, "the same with doubly reparameterized gradients", min_particles=2),
    "renyi": Objective(
        lambda particles: Renyi(0.5, particles, **_VECTORIZED),
        "the Renyi bound of order 1/2 over the particles",
        min_particles=2,
    ),
    "free_bits": Objective(
        lambda particles: FreeBits(0.1, particles),
        "the ELBO, each unit's KL counted from 0.1 nats up",
    ),
    "info_vae": Objective(
        InfoVAE,
        "reconstruction, a tenth of the KL, and the MMD of the aggregate posterior to the prior",
    ),
}
