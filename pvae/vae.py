"""A VAE is a pair of Pyro programs: what people do with one, and the builder of named ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pvae import closed_form, heads, nets, priors
from pvae.closed_form import ClosedForm, Terms
from pvae.conditional import ConcatLabel, Conditional
from pvae.programs import Guide, Model, evaluating


class VAE(nn.Module):
    r"""A pair of Pyro programs, `vae.model = p(z) p(x|z)` and `vae.guide = q(z|x)`.

    Hand the two to any stock Pyro tool; the methods here are what people do with a trained pair.
    Images are `(B, C, H, W)` floats, latents `(*, B, D)`; `y` are labels `(B,)` for pairs that are
    conditional on them. What returns images runs in eval mode and leaves the pair's own mode, and
    BatchNorm's running statistics, as they were.

    Args:
        model: a `pvae.Model`, or any module with `prior` and `likelihood` that is a Pyro program.
        guide: a `pvae.Guide`, or any module with `posterior` that is a Pyro program.
        oracle: the hand-written ELBO of this pair, where there is one.

    >>> vae = build(image_shape=(1, 8, 8), latent_dim=2)
    >>> vae.sample(3).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(self, model: Model, guide: Guide, oracle: ClosedForm | None = None) -> None:
        super().__init__()
        self.model = model
        self.guide = guide
        self.oracle = oracle
        self.recipe: dict[str, Any] | None = None  # the arguments of `build`, to be built again

    def encode(self, x: Tensor, y: Tensor | None = None) -> Any:
        """The posterior `q(z|x)`, batch shape `(B,)`, event shape `(D,)`.

        Raises:
            ValueError: `x` is not a batch of finite floating point images of the pair's shape.
        """
        if not x.is_floating_point() or not x.isfinite().all():
            bad = "is not floating point" if not x.is_floating_point() else "has NaN or infinity"
            raise ValueError(f"x {bad} (dtype {x.dtype}); images are floats in [0, 1]")
        return self.guide.posterior(*_given(x, y))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Any:
        """The likelihood `p(x|z)`, batch shape `(*, B)`, event shape `(C, H, W)`."""
        return self.model.likelihood(*_given(z, y))

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean image at the posterior mean, `(B, C, H, W)`; errors as `encode`."""
        with evaluating(self):
            return self.decode(self.encode(x, y).mean, y).mean

    def sample(self, n: int = 1, y: Tensor | None = None) -> Tensor:
        """Mean images at `n` draws from the prior (one for each label where `y` is given).

        Raises:
            ValueError: `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        with evaluating(self):
            prior = self.model.prior(*(() if y is None else (y,)))
            z = prior.sample((n,)) if y is None else prior.expand((len(y),)).sample()
            return self.decode(z, y).mean

    def interpolate(
        self, start: Tensor, end: Tensor, steps: int = 10, y: Tensor | None = None
    ) -> Tensor:
        """Mean images on the straight lines between posterior means, `(B, steps, C, H, W)`.

        Raises:
            ValueError: `steps` is below 2, or `start` and `end` differ in shape.
        """
        if steps < 2:
            raise ValueError(f"steps must be at least 2, not {steps}")
        if start.shape != end.shape:
            raise ValueError(
                "start and end must have one shape, "
                f"not {tuple(start.shape)} and {tuple(end.shape)}"
            )
        with evaluating(self):
            a, b = self.encode(start, y).mean, self.encode(end, y).mean  # (B, D)
            weights = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
            z = torch.lerp(a, b, weights[:, None, None])  # (steps, B, D)
            return self.decode(z, y).mean.transpose(0, 1)

    def terms(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Terms:
        """The ELBO's terms at `z` `(*, B, D)` without any Pyro handler: hand-written where there
        is an oracle, else from the distributions' own densities."""
        if self.oracle is not None:
            return self.oracle.terms(x, y, z=z)
        prior = self.model.prior(*(() if y is None else (y,)))
        return closed_form.sampled_terms(self.encode(x, y), self.decode(z, y), prior, x, z)

    def check(self, x: Tensor, y: Tensor | None = None) -> None:
        """Checks that the pair can be trained on images like `x`, before a long run starts.

        Raises:
            ValueError: wrong shape or dtype, NaN, or values outside the likelihood's support.
        """
        # a draw, as not every posterior has a mean; it leaves the random state as it was
        with evaluating(self), torch.random.fork_rng([x.device] if x.is_cuda else []):
            p = self.decode(self.encode(x, y).sample(), y)
        if p.event_shape != x.shape[1:]:
            raise ValueError(
                f"x holds images of shape {tuple(x.shape[1:])}, "
                f"but the likelihood is over {tuple(p.event_shape)}"
            )
        outside = int((~_elementwise_support(p).check(x)).sum())
        if outside:
            raise ValueError(
                f"x has values outside the likelihood's support "
                f"({outside} of {x.numel()}; x lies in [{x.min():.3g}, {x.max():.3g}]): "
                f"{type(_base(p)).__name__.lstrip('_')} takes {_base(p).support}. "
                "Binarise the data, or choose a likelihood for grey pixels"
            )


def _given(v: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    return (v,) if y is None else (v, y)


def _base(p: Any) -> Any:
    """The distribution inside `to_event`."""
    return getattr(p, "base_dist", p)


def _elementwise_support(p: Any) -> Any:
    return getattr(p.support, "base_constraint", p.support)


# ---- the named builder: one table for each thing that can be chosen ----

HeadFactory = Callable[[Sequence[int]], heads.Head]


class Likelihood(NamedTuple):
    """A named likelihood: its head, its hand-written log density, and the data it is for."""

    head: HeadFactory
    log_likelihood: Callable[[Any, Tensor, Tensor], Tensor]  # (head, x, raw) -> (*, B)
    binary: bool
    label: str


class Posterior(NamedTuple):
    """A named posterior: its head, and the hand-written split of its raw parameters."""

    head: HeadFactory
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    label: str


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


LIKELIHOODS: Mapping[str, Likelihood] = {
    "bernoulli": Likelihood(heads.Bernoulli, _bernoulli, True, "Bernoulli pixels from logits"),
    "grey_bernoulli": Likelihood(
        heads.GreyBernoulli, _bernoulli, False, "cross-entropy on grey pixels: not a likelihood"
    ),
    "continuous_bernoulli": Likelihood(
        heads.ContinuousBernoulli, _continuous_bernoulli, False, "continuous Bernoulli, grey pixels"
    ),
    "gaussian": Likelihood(
        heads.NormalFixedScale, _normal_fixed, False, "normal with fixed scale 1: squared error"
    ),
    "gaussian_shared": Likelihood(
        heads.NormalSharedScale, _normal_shared, False, "normal with one learned scale"
    ),
    "gaussian_pixelwise": Likelihood(
        partial(heads.Normal, min_scale=0.01),
        _normal_pixelwise,
        False,
        "normal with a scale for each pixel from the network",
    ),
}

GUIDES: Mapping[str, Posterior] = {
    "normal": Posterior(heads.Normal, closed_form.loc_log_variance, "loc and log-variance"),
    "normal_log_scale": Posterior(
        partial(heads.Normal, link=heads.from_log_scale),
        closed_form.loc_log_scale,
        "loc and log-scale",
    ),
}

PRIORS: Mapping[str, Callable[[int], nn.Module]] = {"standard_normal": priors.StandardNormal}


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
    """A named objective: Pyro's own, and the same loss by hand from the ELBO's terms.

    `by_hand(terms, beta)` takes terms `(particles, B)` and returns the loss summed over images.
    """

    elbo: Callable[[int], ELBO]  # number of particles -> Pyro's objective
    by_hand: Callable[[Terms, float], Tensor]
    label: str


def _sampled(terms: Terms, beta: float) -> Tensor:
    return -terms.elbo_sampled(beta).mean(0).sum()


def _mean_field(terms: Terms, beta: float) -> Tensor:
    return -(terms.elbo_sampled(beta) if terms.kl is None else terms.elbo(beta)).mean(0).sum()


def _importance_weighted(terms: Terms, beta: float) -> Tensor:
    log_weights = terms.elbo_sampled(beta)
    return -(log_weights.logsumexp(0) - math.log(len(log_weights))).sum()


# vectorized particles are one more leading dimension. max_plate_nesting is given, because an
# objective that has to guess it spends random numbers on its first call
_vectorized = {"vectorize_particles": True, "max_plate_nesting": 1}

OBJECTIVES: Mapping[str, Objective] = {
    "trace_elbo": Objective(
        lambda particles: Trace_ELBO(particles, **_vectorized),
        _sampled,
        "the ELBO, its KL sampled",
    ),
    "trace_mean_field_elbo": Objective(
        lambda particles: TraceMeanField_ELBO(particles, **_vectorized),
        _mean_field,
        "the ELBO, its KL analytic where it exists",
    ),
    "iwae": Objective(
        lambda particles: RenyiELBO(0, particles, **_vectorized),
        _importance_weighted,
        "the importance-weighted bound over the particles",
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
        mean_image: `(C, H, W)` in [0, 1]: the decoder's output bias starts there, without which
            a run may sit for epochs at the collapsed solution.

    Raises:
        ValueError: a name that is not in its table, or a size below 1.

    >>> vae = build((3, 20, 16), latent_dim=4, net="mlp", likelihood="gaussian_shared")
    >>> vae.reconstruct(torch.rand(2, 3, 20, 16)).shape
    torch.Size([2, 3, 20, 16])
    >>> build((1, 8, 8), latent_dim=2, num_classes=10).sample(y=torch.arange(10)).shape
    torch.Size([10, 1, 8, 8])
    """
    if hidden < 1:
        raise ValueError(f"hidden must be at least 1, not {hidden}")
    family = choose("likelihood", likelihood, LIKELIHOODS)
    posterior_family = choose("guide", guide, GUIDES)
    architecture = choose("net", net, NETS)
    make_activation = choose("activation", activation, ACTIVATIONS)
    prior_module = choose("prior", prior, PRIORS)(latent_dim)

    # what the networks take: an image and a latent, or each joined with a label
    x_shape: tuple[int, ...] = tuple(image_shape)
    z_shape: tuple[int, ...] = (latent_dim,)
    x_join = z_join = None
    if num_classes is not None:
        x_join = ConcatLabel(num_classes, event_dim=3, flatten=architecture.flat)
        z_join = ConcatLabel(num_classes)
        x_shape, z_shape = x_join.joined_shape(x_shape), z_join.joined_shape(z_shape)

    posterior_head = posterior_family.head((latent_dim,))
    encoder = architecture.encoder(x_shape, posterior_head.param_shape, hidden, make_activation)
    posterior = Conditional(encoder, posterior_head, event_dim=len(x_shape), join=x_join)

    head = family.head(tuple(image_shape))
    decoder = architecture.decoder(z_shape, head.param_shape, hidden, make_activation)
    if mean_image is not None:
        decoder.set_output_bias(head.raw_mean(mean_image))
    likelihood_module = Conditional(decoder, head, event_dim=1, join=z_join)

    oracle = ClosedForm(
        encode=posterior.raw,
        decode=likelihood_module.raw,
        split=posterior_family.split,
        log_likelihood=partial(family.log_likelihood, head),
    )
    vae = VAE(Model(prior_module, likelihood_module), Guide(posterior), oracle)
    vae.recipe = {
        "image_shape": list(image_shape),
        "latent_dim": latent_dim,
        "net": net,
        "likelihood": likelihood,
        "guide": guide,
        "prior": prior,
        "hidden": hidden,
        "activation": activation,
        "num_classes": num_classes,
    }
    return vae
