"""The named builder: a table for each thing that can be chosen by name, and what composes them."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pvae import closed_form, flows, heads, nets, objectives, priors
from pvae.closed_form import ClosedForm, Terms
from pvae.conditional import ConcatLabel, ConcatVector, Conditional, ignore_label
from pvae.programs import Guide, HierarchicalGuide, HierarchicalModel, Model
from pvae.vae import VAE

HeadFactory = Callable[[Sequence[int]], nn.Module]


class Likelihood(NamedTuple):
    """A named likelihood: its head, its hand-written log density, and the data it is for."""

    head: Callable[[Sequence[int]], heads.Head]
    log_likelihood: Callable[[Any, Tensor, Tensor], Tensor]  # (head, x, raw) -> (*, B)
    data: str  # "binary", "levels" (256 of grey) or "grey" (any number in [0, 1])
    label: str

    @property
    def binary(self) -> bool:
        return self.data == "binary"


class Posterior(NamedTuple):
    """A named posterior: its head, and, where there is a closed form, the hand-written split of
    its raw parameters; `amortized` unless it holds one factor for each datum."""

    head: HeadFactory
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    label: str
    amortized: bool = True
    baseline: bool = False


class Given(NamedTuple):
    """What a prior may be made of."""

    latent_dim: int
    posterior: nn.Module
    image_shape: tuple[int, ...]
    components: int
    num_classes: int | None
    side_dim: int | None
    mean_image: Tensor | None


class Prior(NamedTuple):
    """A named prior; `standard` is the one that the closed form knows, `of_images` one that is made
    of posteriors of images."""

    make: Callable[[Given], nn.Module]
    label: str
    standard: bool = False
    of_images: bool = False


class Net(NamedTuple):
    """A named architecture: `encoder(image_shape, out_shape)`, `decoder(latent_shape, out_shape)`,
    each with the hidden width and the activation; `flat` where a label is better appended to the
    flattened image than given as planes."""

    encoder: Callable[[Sequence[int], Sequence[int], int, nets.Activation], nn.Module]
    decoder: Callable[[Sequence[int], Sequence[int], int, nets.Activation], nn.Module]
    label: str
    flat: bool = False


def _bernoulli(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.bernoulli(x, h)


def _continuous_bernoulli(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.continuous_bernoulli(x, h)


def _normal_fixed(head: heads.NormalFixedScale, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.normal(x, h, torch.tensor(head.scale, dtype=h.dtype, device=h.device).log())


def _normal_shared(head: heads.NormalSharedScale, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.normal(x, h, (head.min_scale + head.log_scale.exp()).log())


def _normal_pixelwise(head: heads.Normal, x: Tensor, h: Tensor) -> Tensor:
    loc, log_variance = h.split(h.shape[-3] // 2, dim=-3)
    return closed_form.normal(x, loc, (head.min_scale + (log_variance / 2).exp()).log())


def _laplace(head: heads.Laplace, x: Tensor, h: Tensor) -> Tensor:
    loc, log_scale = h.split(h.shape[-3] // 2, dim=-3)
    return closed_form.laplace(x, loc, (head.min_scale + log_scale.exp()).log())


def _discretized_logistic(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    loc, log_scale = h.unflatten(-3, (2, 1, -1)).unbind(-5)  # (*, B, K = 1, C, H, W)
    scale = log_scale.exp() + heads.MIN_LOGISTIC_SCALE
    return closed_form.discretized_logistics(x, loc, scale, torch.zeros_like(loc))


def _logistic_mixture(head: heads.MixtureOfDiscretizedLogistics, x: Tensor, h: Tensor) -> Tensor:
    logits, loc, log_scale = h.unflatten(-3, (3, head.components, -1)).unbind(-5)
    scale = log_scale.exp() + heads.MIN_LOGISTIC_SCALE
    return closed_form.discretized_logistics(x, loc, scale, logits)


def _grey_categorical(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.grey_categorical(x, h.unflatten(-3, (heads.LEVELS, -1)))


LIKELIHOODS: Mapping[str, Likelihood] = {
    "bernoulli": Likelihood(
        heads.Bernoulli, _bernoulli, "binary", "Bernoulli pixels from logits: binary data"
    ),
    "grey_bernoulli": Likelihood(
        heads.GreyBernoulli, _bernoulli, "grey", "cross-entropy on grey pixels: not a likelihood"
    ),
    "continuous_bernoulli": Likelihood(
        heads.ContinuousBernoulli, _continuous_bernoulli, "grey", "continuous Bernoulli on [0, 1]"
    ),
    "gaussian": Likelihood(
        heads.NormalFixedScale, _normal_fixed, "grey", "normal with fixed scale 1: squared error"
    ),
    "gaussian_shared": Likelihood(
        heads.NormalSharedScale, _normal_shared, "grey", "normal with one learned scale"
    ),
    "gaussian_pixelwise": Likelihood(
        partial(heads.Normal, min_scale=0.01),
        _normal_pixelwise,
        "grey",
        "normal with a scale for each pixel from the network",
    ),
    "laplace": Likelihood(
        heads.Laplace, _laplace, "grey", "Laplace with a scale for each pixel from the network"
    ),
    "discretized_logistic": Likelihood(
        heads.DiscretizedLogistic,
        _discretized_logistic,
        "levels",
        "rounded logistic: the 256 levels of 8-bit data",
    ),
    "logistic_mixture": Likelihood(
        heads.MixtureOfDiscretizedLogistics,
        _logistic_mixture,
        "levels",
        "mixture of 5 rounded logistics: 8-bit data",
    ),
    "categorical": Likelihood(
        heads.Categorical,
        _grey_categorical,
        "levels",
        "free probabilities of 256 levels: 8-bit data",
    ),
}

GUIDES: Mapping[str, Posterior] = {
    "normal": Posterior(heads.Normal, closed_form.loc_log_variance, "loc and log-variance"),
    "normal_log_scale": Posterior(
        partial(heads.Normal, link=heads.from_log_scale),
        closed_form.loc_log_scale,
        "loc and log-scale",
    ),
    "full_covariance": Posterior(heads.FullCovariance, None, "normal with a full covariance"),
    "low_rank": Posterior(heads.LowRankCovariance, None, "normal, covariance of rank 2 + diagonal"),
    "mixture": Posterior(heads.MixtureOfNormals, None, "mixture of 4 diagonal normals"),
    "iaf": Posterior(flows.FlowPosterior, None, "inverse autoregressive flow"),
    "spline": Posterior(
        partial(flows.FlowPosterior, kind=flows.SPLINE), None, "autoregressive neural spline flow"
    ),
    "score_function": Posterior(
        heads.ScoreFunctionNormal,
        closed_form.loc_log_variance,
        "normal, not reparameterized: score-function gradients",
    ),
    "score_function_baseline": Posterior(
        heads.ScoreFunctionNormal,
        closed_form.loc_log_variance,
        "the same with a neural baseline, for trace_graph_elbo",
        baseline=True,
    ),
    "per_datum": Posterior(
        heads.Normal,
        None,
        "one normal factor for each datum, called with index: not amortized",
        amortized=False,
    ),
}


def _conditional_normal(given: Given) -> nn.Module:
    """`p(z | y)`: a normal for each label, or from a small network of the side vector."""
    head = heads.Normal((given.latent_dim,))
    if given.num_classes is not None:
        table = nn.Embedding(given.num_classes, head.param_shape[0])
        nn.init.normal_(table.weight, std=0.1)  # near the standard normal, classes apart
        return Conditional(table, head, event_dim=0)
    if given.side_dim is not None:
        return Conditional(nets.MLP((given.side_dim,), head.param_shape, (32,)), head, event_dim=1)
    raise ValueError(
        "prior 'conditional' is p(z | y): it needs num_classes (--conditional) or side_dim, for "
        "there is no y"
    )


def _vamp(given: Given) -> nn.Module:
    return priors.VampPrior(
        given.posterior,
        given.image_shape,
        components=given.components,
        mean_image=given.mean_image,
        label_dim=0 if given.side_dim is None else 1,
    )


PRIORS: Mapping[str, Prior] = {
    "standard_normal": Prior(lambda g: priors.StandardNormal(g.latent_dim), "N(0, I)", True),
    "mixture": Prior(
        lambda g: priors.MixtureOfNormals(g.latent_dim, components=g.components),
        "learned mixture of normals",
    ),
    "vamp": Prior(
        _vamp, "mixture of posteriors at learned pseudo-inputs (VampPrior)", of_images=True
    ),
    "flow": Prior(lambda g: flows.FlowPrior(g.latent_dim), "masked autoregressive flow"),
    "conditional": Prior(_conditional_normal, "p(z | y), a normal for each label"),
}


def _mlp(
    in_shape: Sequence[int], out_shape: Sequence[int], hidden: int, activation: nets.Activation
) -> nn.Module:
    return nets.MLP(in_shape, out_shape, (hidden,), activation)


def _without_hidden(net: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """For a net whose published form has no hidden layer."""

    def make(
        in_shape: Sequence[int], out_shape: Sequence[int], hidden: int, activation: nets.Activation
    ) -> nn.Module:
        return net(in_shape, out_shape, activation=activation)

    return make


NETS: Mapping[str, Net] = {
    "conv": Net(
        nets.ConvEncoder,
        _without_hidden(nets.ConvDecoder),
        "two strided convolutions and their mirror",
    ),
    "mlp": Net(_mlp, _mlp, "one hidden layer each way", flat=True),
    "course": Net(
        _without_hidden(nets.CourseEncoder),
        _without_hidden(nets.CourseDecoder),
        "three 4x4 convolutions, for 28x28 alone",
    ),
    "deep": Net(
        _without_hidden(nets.DeepEncoder),
        _without_hidden(nets.DeepDecoder),
        "five strided convolutions with BatchNorm",
    ),
}

ACTIVATIONS: Mapping[str, nets.Activation] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


class Objective(NamedTuple):
    """A named objective: Pyro's or ours, and the same loss by hand from the ELBO's terms.

    `by_hand(terms, beta)` takes terms `(particles, B)` and returns the loss summed over images;
    None where the loss is no function of them.
    """

    elbo: Callable[[int], ELBO]  # number of particles -> the objective
    by_hand: Callable[[Terms, float], Tensor] | None
    label: str
    min_particles: int = 1


def _sampled(terms: Terms, beta: float) -> Tensor:
    return -terms.elbo_sampled(beta).mean(0).sum()


def _mean_field(terms: Terms, beta: float) -> Tensor:
    return -(terms.elbo_sampled(beta) if terms.kl is None else terms.elbo(beta)).mean(0).sum()


def _importance_weighted(terms: Terms, beta: float) -> Tensor:
    log_weights = terms.elbo_sampled(beta)
    return -(log_weights.logsumexp(0) - math.log(len(log_weights))).sum()


def _renyi(terms: Terms, beta: float) -> Tensor:
    log_weights = (1 - _ALPHA) * terms.elbo_sampled(beta)
    return -(log_weights.logsumexp(0) - math.log(len(log_weights))).sum() / (1 - _ALPHA)


def _free_bits(terms: Terms, beta: float) -> Tensor:
    if terms.kl_by_unit is None:
        raise ValueError("free_bits needs the analytic KL of each latent unit, and there is none")
    batch = terms.reconstruction.shape[-1]
    kl = terms.kl_by_unit.mean(0).clamp(min=_FREE_NATS).sum()
    return batch * beta * kl - terms.reconstruction.mean(0).sum()


_ALPHA = 0.5  # of "renyi"
_FREE_NATS = 0.1  # of "free_bits", for each latent unit

# vectorized particles are one more leading dimension. max_plate_nesting is given, because an
# objective that has to guess it spends random numbers on its first call
_vectorized: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}

OBJECTIVES: Mapping[str, Objective] = {
    "trace_elbo": Objective(
        lambda particles: Trace_ELBO(particles, **_vectorized),
        _sampled,
        "the ELBO, its KL sampled",
    ),
    "trace_mean_field_elbo": Objective(
        lambda particles: objectives.MeanField(particles, **_vectorized),
        _mean_field,
        "the ELBO, its KL analytic where it exists",
    ),
    "trace_graph_elbo": Objective(
        # its baselines are for one particle at a time
        lambda particles: TraceGraph_ELBO(particles, max_plate_nesting=1),
        _sampled,
        "the ELBO, score-function gradients with baselines",
    ),
    "iwae": Objective(
        lambda particles: objectives.Renyi(0, particles, **_vectorized),
        _importance_weighted,
        "the importance-weighted bound over the particles",
        min_particles=2,
    ),
    "dreg": Objective(
        lambda particles: objectives.DReG(particles, **_vectorized),
        _importance_weighted,
        "the same with doubly reparameterized gradients",
        min_particles=2,
    ),
    "renyi": Objective(
        lambda particles: objectives.Renyi(_ALPHA, particles, **_vectorized),
        _renyi,
        "the Renyi bound of order 1/2 over the particles",
        min_particles=2,
    ),
    "free_bits": Objective(
        lambda particles: objectives.FreeBits(_FREE_NATS, particles, **_vectorized),
        _free_bits,
        "the ELBO, each unit's KL counted from 0.1 nats up",
    ),
    "info_vae": Objective(
        lambda particles: objectives.InfoVAE(particles, **_vectorized),
        None,
        "reconstruction, a tenth of the KL, and the MMD of the aggregate posterior to the prior",
    ),
}


def choose(name: str, value: str, table: Mapping[str, Any]) -> Any:
    """The entry of a table, or a `ValueError` that lists what there is.

    >>> choose("net", "cnn", NETS)
    Traceback (most recent call last):
    ValueError: net must be one of conv, mlp, course, deep, not 'cnn'
    """
    if value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)}, not {value!r}")
    return table[value]


def build(
    image_shape: Sequence[int] = (1, 28, 28),
    latent_dim: int = 16,
    net: str = "conv",
    likelihood: str = "bernoulli",
    guide: str = "normal",
    prior: str = "standard_normal",
    *,
    hidden: int = 256,
    activation: str = "silu",
    num_classes: int | None = None,
    side_dim: int | None = None,
    top_dim: int | None = None,
    components: int = 50,
    num_data: int | None = None,
    mean_image: Tensor | None = None,
) -> VAE:
    """Builds a VAE from names: the tables `NETS`, `LIKELIHOODS`, `GUIDES` and `PRIORS`.

    Args:
        image_shape: `(C, H, W)`.
        latent_dim: the latent's dimension `D`.
        hidden, activation: of the networks; the published forms are 16 and "relu" for "conv",
            "relu" for "course" and "leaky_relu" for "deep", which have no hidden width.
        num_classes: makes the pair conditional on labels `y` `(B,)` from 0 to `num_classes - 1`:
            `p(x | z, y)` and `q(z | x, y)`, one-hot labels joining decoder and encoder.
        side_dim: makes it conditional on side vectors `y` `(B, side_dim)` instead.
        top_dim: puts a second latent layer of this dimension above: `p(z2) p(z1 | z2) p(x | z1)`
            and `q(z1 | x) q(z2 | z1)`, `z1` of `latent_dim`; the prior is that of `z2`.
        components: of the priors "mixture" and "vamp".
        num_data: how many data the guide "per_datum" holds a factor for.
        mean_image: `(C, H, W)` in [0, 1]: the decoder's output bias starts there, without which
            a run may sit for epochs at the collapsed solution.

    Raises:
        ValueError: a name that is not in its table, a size below 1, or parts that do not fit.

    >>> vae = build((3, 20, 16), latent_dim=4, net="mlp", likelihood="gaussian_shared")
    >>> vae.reconstruct(torch.rand(2, 3, 20, 16)).shape
    torch.Size([2, 3, 20, 16])
    >>> build((1, 8, 8), latent_dim=2, num_classes=10).sample(y=torch.arange(10)).shape
    torch.Size([10, 1, 8, 8])
    >>> build((1, 8, 8), latent_dim=4, guide="iaf", prior="vamp", top_dim=2)
    Traceback (most recent call last):
    ValueError: prior 'vamp' is a mixture of posteriors of images, but with top_dim ...
    """
    recipe = {
        "image_shape": list(image_shape),
        "latent_dim": latent_dim,
        "net": net,
        "likelihood": likelihood,
        "guide": guide,
        "prior": prior,
        "hidden": hidden,
        "activation": activation,
        "num_classes": num_classes,
        "side_dim": side_dim,
        "top_dim": top_dim,
        "components": components,
        "num_data": num_data,
    }
    sizes = {"latent_dim": latent_dim, "hidden": hidden, "side_dim": side_dim, "top_dim": top_dim}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
    if num_classes is not None and side_dim is not None:
        raise ValueError(
            f"num_classes ({num_classes}) and side_dim ({side_dim}) are two kinds of y: give one"
        )
    family = choose("likelihood", likelihood, LIKELIHOODS)
    posterior_family = choose("guide", guide, GUIDES)
    architecture = choose("net", net, NETS)
    make_activation = choose("activation", activation, ACTIVATIONS)
    prior_family = choose("prior", prior, PRIORS)
    _check_parts(guide, posterior_family, prior, prior_family, top_dim, num_data)

    # what the networks take: an image and a latent, or each joined with y
    image = tuple(image_shape)

    def join(event_dim: int, flatten: bool = False) -> ConcatVector | None:
        if num_classes is not None:
            return ConcatLabel(num_classes, event_dim=event_dim, flatten=flatten)
        if side_dim is not None:
            return ConcatVector(side_dim, event_dim=event_dim, flatten=flatten)
        return None

    def between(in_dim: int, head: Any) -> Conditional:
        """A conditional distribution of one latent given another, by a small network."""
        joined, shape = _joined(join(1), (in_dim,))
        return Conditional(
            _mlp(shape, head.param_shape, hidden, make_activation), head, event_dim=1, join=joined
        )

    # q(z | x, y)
    posterior_head: Any = posterior_family.head((latent_dim,))
    if posterior_family.amortized:
        x_join, x_shape = _joined(join(3, flatten=architecture.flat), image)
        encoder = architecture.encoder(x_shape, posterior_head.param_shape, hidden, make_activation)
        posterior = Conditional(encoder, posterior_head, event_dim=len(x_shape), join=x_join)
    else:
        assert num_data is not None
        table = nn.Embedding(num_data, posterior_head.param_shape[0])
        nn.init.zeros_(table.weight)  # every factor starts at N(0, I)
        without_y = None if join(1) is None else ignore_label
        posterior = Conditional(table, posterior_head, event_dim=0, join=without_y)

    # p(x | z, y)
    head = family.head(image)
    z_join, z_shape = _joined(join(1), (latent_dim,))
    decoder = architecture.decoder(z_shape, head.param_shape, hidden, make_activation)
    if mean_image is not None:
        decoder.set_output_bias(head.raw_mean(mean_image))
    likelihood_module = Conditional(decoder, head, event_dim=1, join=z_join)

    # p(z | y)
    prior_module = prior_family.make(
        Given(
            latent_dim if top_dim is None else top_dim,
            posterior,
            image,
            components,
            num_classes,
            side_dim,
            mean_image,
        )
    )
    if top_dim is not None:
        model = HierarchicalModel(
            prior_module, between(top_dim, heads.Normal((latent_dim,))), likelihood_module
        )
        top = between(latent_dim, posterior_family.head((top_dim,)))
        vae = VAE(model, HierarchicalGuide(posterior, top))
    else:
        baseline = None
        if posterior_family.baseline:  # costs are of the size of an image's log density
            numel = math.prod(image)
            baseline = nn.Sequential(nets.MLP(image, (1,), (hidden,)), nets.Affine(numel, 0))
        vae = VAE(Model(prior_module, likelihood_module), Guide(posterior, baseline))
        if posterior_family.split is not None and prior_family.standard:
            vae.oracle = ClosedForm(
                encode=posterior.raw,
                decode=likelihood_module.raw,
                split=posterior_family.split,
                log_likelihood=partial(family.log_likelihood, head),
            )
    vae.recipe = recipe
    return vae


def _joined(
    join: ConcatVector | None, shape: tuple[int, ...]
) -> tuple[ConcatVector | None, tuple[int, ...]]:
    """A join and the shape of what it returns."""
    return join, shape if join is None else join.joined_shape(shape)


def _check_parts(
    guide: str,
    posterior: Posterior,
    prior: str,
    prior_family: Prior,
    top_dim: int | None,
    num_data: int | None,
) -> None:
    """Refuses what cannot work together, with the reason."""
    if posterior.amortized == (num_data is not None):
        raise ValueError(
            f"num_data is {num_data}: guide {guide!r} "
            + (
                "has no use for it"
                if posterior.amortized
                else "needs the number of data, one factor for each"
            )
        )
    if prior_family.of_images and not posterior.amortized:
        raise ValueError(
            f"prior {prior!r} puts pseudo-inputs through q(z|x), but guide {guide!r} is no "
            "function of images: choose an amortized guide"
        )
    if prior_family.of_images and top_dim is not None:
        raise ValueError(
            f"prior {prior!r} is a mixture of posteriors of images, but with top_dim the prior is "
            "that of z2, whose posterior takes z1: choose another prior"
        )
    if posterior.baseline and top_dim is not None:
        raise ValueError(
            f"guide {guide!r} has a baseline for one latent layer: with top_dim choose another"
        )
