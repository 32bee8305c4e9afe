"""Builds a VAE from names: a table for each kind of part, and the functions that compose parts."""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pvae import closed_form, flows, heads, nets, priors
from pvae.closed_form import ClosedForm
from pvae.conditional import ConcatLabel, ConcatVector, Conditional, ignore_label
from pvae.kinds import Shape
from pvae.programs import Guide, HierarchicalGuide, HierarchicalModel, LadderGuide, Model
from pvae.vae import VAE

HeadFactory = Callable[[Shape], nn.Module]


class Likelihood(NamedTuple):
    """A named likelihood: its head, its hand-written log density, and the kind of data it suits."""

    head: Callable[[Shape], heads.Head]
    log_likelihood: Callable[[Any, Tensor, Tensor], Tensor]  # (head, x, raw) -> (*, B)
    data: str  # a kind of `pvae.data.KINDS`: "binary", "levels", "counts" or "continuous"
    label: str
    taken: Callable[[], nn.Module] | None = None  # makes a module that prepares the data for nets

    @property
    def kind(self) -> str:
        """The kind of its numbers: only numbers of the same kind can be compared."""
        normalized = self.head((1, 1, 1)).normalized
        return self.data if normalized else f"{self.data}, not a likelihood"


class Posterior(NamedTuple):
    """A named posterior: its head, and the hand-written split of the head's raw parameters.

    `split` is None where the ELBO has no closed form. `amortized` is False for one factor for each
    datum; `baseline` adds a neural baseline; `ladder` is a guide that goes down the model's own
    layers; `flow` is the kind of the flow, None for a posterior without one.
    """

    head: HeadFactory
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    label: str
    amortized: bool = True
    baseline: bool = False
    ladder: bool = False
    flow: flows.Kind | None = None


class Prior(NamedTuple):
    """A named prior: `make` takes the recipe, the dimension, the posterior and the mean image.

    `components` is the default number of components, None for a prior without components; `flow`
    is the kind of the flow, None for a prior without one; `standard` is True for N(0, I), the only
    prior of the closed form; `of_images` is True for a mixture of posteriors of images.
    """

    make: Callable[["Recipe", int, nn.Module, Tensor | None], nn.Module]
    label: str
    components: int | None = None
    standard: bool = False
    of_images: bool = False
    flow: flows.Kind | None = None


class Net(NamedTuple):
    """A named architecture: the functions that make its encoder and its decoder.

    Both take the shapes of one input and one output, the hidden width and the activation.
    `activation` and `hidden` are the defaults (`hidden` is None for a net without a hidden width);
    `event` names the sizes of one datum, None for a net that takes any shape; `flat` is True where
    a label is better appended to the flattened datum than given as planes.
    """

    encoder: Callable[[Shape, Shape, int, nets.Activation], nn.Module]
    decoder: Callable[[Shape, Shape, int, nets.Activation], nn.Module]
    label: str
    activation: str
    hidden: int | None = None
    event: Sequence[str] | None = nets.IMAGE
    flat: bool = False


# the hand-written log densities of the likelihoods, from a head and its raw parameters


def _bernoulli(head: Any, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.bernoulli(x, h)


def _continuous_bernoulli(head: Any, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.continuous_bernoulli(x, h)


def _normal_fixed(head: heads.NormalFixedScale, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.normal(x, h, torch.tensor(head.scale, dtype=h.dtype, device=h.device).log())


def _normal_shared(head: heads.NormalSharedScale, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.normal(x, h, (head.min_scale + head.log_scale.exp()).log())


def _normal_pixelwise(head: heads.Normal, x: Tensor, h: Tensor) -> Tensor:
    loc, log_variance = h.chunk(2, dim=-head.event_dim)
    return closed_form.normal(x, loc, (head.min_scale + (log_variance / 2).exp()).log())


def _laplace(head: heads.Laplace, x: Tensor, h: Tensor) -> Tensor:
    loc, log_scale = h.chunk(2, dim=-head.event_dim)
    return closed_form.laplace(x, loc, (head.min_scale + log_scale.exp()).log())


def _discretized_logistic(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    e = head.event_dim
    loc, log_scale = h.unflatten(-e, (2, 1, -1)).unbind(-e - 2)  # (*, B, K = 1, *event)
    scale = log_scale.exp() + heads.MIN_LOGISTIC_SCALE
    return closed_form.discretized_logistics(x, loc, scale, torch.zeros_like(loc))


def _logistic_mixture(head: heads.MixtureOfDiscretizedLogistics, x: Tensor, h: Tensor) -> Tensor:
    e = head.event_dim
    logits, loc, log_scale = h.unflatten(-e, (3, head.components, -1)).unbind(-e - 2)
    scale = log_scale.exp() + heads.MIN_LOGISTIC_SCALE
    return closed_form.discretized_logistics(x, loc, scale, logits)


def _grey_categorical(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.grey_categorical(x, h.unflatten(-head.event_dim, (heads.LEVELS, -1)))


def _poisson(head: heads.Head, x: Tensor, h: Tensor) -> Tensor:
    return closed_form.poisson(x, h)


def _negative_binomial(head: heads.NegativeBinomial, x: Tensor, h: Tensor) -> Tensor:
    log_mean, raw = h.chunk(2, dim=-head.event_dim)
    return closed_form.negative_binomial(x, log_mean, (head.min_dispersion + raw.exp()).log())


#: The likelihoods, by name.
LIKELIHOODS: Mapping[str, Likelihood] = {
    "bernoulli": Likelihood(
        heads.Bernoulli, _bernoulli, "binary", "Bernoulli pixels from logits: binary data"
    ),
    "grey_bernoulli": Likelihood(
        heads.GreyBernoulli,
        _bernoulli,
        "continuous",
        "cross-entropy on grey pixels: not a likelihood",
    ),
    "continuous_bernoulli": Likelihood(
        heads.ContinuousBernoulli,
        _continuous_bernoulli,
        "continuous",
        "continuous Bernoulli on [0, 1]",
    ),
    "gaussian": Likelihood(
        heads.NormalFixedScale,
        _normal_fixed,
        "continuous",
        "normal with fixed scale 1: squared error",
    ),
    "gaussian_shared": Likelihood(
        heads.NormalSharedScale, _normal_shared, "continuous", "normal with one learned scale"
    ),
    "gaussian_pixelwise": Likelihood(
        partial(heads.Normal, min_scale=0.01),
        _normal_pixelwise,
        "continuous",
        "normal with a scale for each pixel from the network",
    ),
    "laplace": Likelihood(
        heads.Laplace,
        _laplace,
        "continuous",
        "Laplace with a scale for each pixel from the network",
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
    "poisson": Likelihood(
        heads.Poisson, _poisson, "counts", "Poisson counts from log-rates", nets.LogCounts
    ),
    "negative_binomial": Likelihood(
        heads.NegativeBinomial,
        _negative_binomial,
        "counts",
        "negative binomial counts: more variance than Poisson",
        nets.LogCounts,
    ),
}

#: The guides, by name.
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
    "iaf": Posterior(flows.FlowPosterior, None, "inverse autoregressive flow", flow=flows.AFFINE),
    "spline": Posterior(
        partial(flows.FlowPosterior, kind=flows.SPLINE),
        None,
        "autoregressive neural spline flow",
        flow=flows.SPLINE,
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
    "ladder": Posterior(
        heads.Normal,
        None,
        "for two layers or more: from the top down, the prior of each layer times a normal from x",
        ladder=True,
    ),
    "per_datum": Posterior(
        heads.Normal,
        None,
        "one normal factor for each datum, called with index: not amortized",
        amortized=False,
    ),
}


def _conditional_normal(
    recipe: "Recipe", dim: int, posterior: nn.Module, mean_image: Tensor | None
) -> nn.Module:
    """`p(z | y)`: a normal for each label, or a normal from a small network of the side vector."""
    head = heads.Normal((dim,))
    if recipe.num_classes is not None:
        table = nn.Embedding(recipe.num_classes, head.param_shape[0])
        nn.init.normal_(table.weight, std=0.1)  # near N(0, I), different for each class
        return Conditional(table, head, event_dim=0)
    if recipe.side_dim is not None:
        return Conditional(nets.MLP((recipe.side_dim,), head.param_shape, (32,)), head, event_dim=1)
    raise ValueError(
        "prior 'conditional' is p(z | y): it needs num_classes (--conditional) or side_dim, for "
        "there is no y"
    )


def _vamp(recipe: "Recipe", dim: int, posterior: nn.Module, mean_image: Tensor | None) -> nn.Module:
    return priors.VampPrior(
        posterior,
        recipe.event_shape,
        components=recipe.own_components,
        mean_image=mean_image,
        counts=LIKELIHOODS[recipe.likelihood].data == "counts",
        label_dim=0 if recipe.side_dim is None else 1,
    )


#: The priors, by name.
PRIORS: Mapping[str, Prior] = {
    "standard_normal": Prior(
        lambda recipe, dim, *_: priors.StandardNormal(dim), "N(0, I)", standard=True
    ),
    "mixture": Prior(
        lambda recipe, dim, *_: priors.MixtureOfNormals(dim, components=recipe.own_components),
        "learned mixture of normals",
        components=50,
    ),
    "vamp": Prior(
        _vamp,
        "mixture of posteriors at learned pseudo-inputs (VampPrior)",
        components=50,
        of_images=True,
    ),
    "coupling": Prior(
        lambda recipe, dim, *_: flows.CouplingPrior(dim), "coupling flow (RealNVP), 4 transforms"
    ),
    "flow": Prior(
        lambda recipe, dim, *_: flows.FlowPrior(dim),
        "masked autoregressive flow",
        flow=flows.AFFINE,
    ),
    "conditional": Prior(_conditional_normal, "p(z | y), a normal for each label"),
}


def _mlp(in_shape: Shape, out_shape: Shape, hidden: int, activation: nets.Activation) -> nn.Module:
    return nets.MLP(in_shape, out_shape, (hidden,), activation)


def _gated(
    in_shape: Shape, out_shape: Shape, hidden: int, activation: nets.Activation
) -> nn.Module:
    return nets.GatedMLP(in_shape, out_shape, (hidden, hidden), activation)


def _without_hidden(net: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Adapts a net that takes no hidden width: the factory drops this argument."""

    return lambda in_shape, out_shape, hidden, activation: net(
        in_shape, out_shape, activation=activation
    )


def _of_one_width(net: Any) -> Any:
    return lambda in_shape, out_shape, hidden, activation: net(
        in_shape, out_shape, (hidden,) * 3, activation
    )


#: The networks, by name.
NETS: Mapping[str, Net] = {
    "conv": Net(
        nets.ConvEncoder,
        _without_hidden(nets.ConvDecoder),
        "two strided convolutions and their mirror",
        activation="silu",
        hidden=256,
    ),
    "mlp": Net(
        _mlp,
        _mlp,
        "one hidden layer each way, for data of any shape",
        activation="silu",
        hidden=256,
        event=None,
        flat=True,
    ),
    "gated": Net(
        _gated,
        _gated,
        "two gated hidden layers each way, for data of any shape",
        activation="identity",
        hidden=300,
        event=None,
        flat=True,
    ),
    "resnet": Net(
        _of_one_width(nets.ResNetEncoder),
        _of_one_width(nets.ResNetDecoder),
        "residual blocks at three sizes, as many channels as hidden",
        activation="silu",
        hidden=64,
    ),
    "course": Net(
        _without_hidden(nets.CourseEncoder),
        _without_hidden(nets.CourseDecoder),
        "three 4x4 convolutions, for 28x28 alone",
        activation="relu",
    ),
    "deep": Net(
        _without_hidden(nets.DeepEncoder),
        _without_hidden(nets.DeepDecoder),
        "five strided convolutions with BatchNorm",
        activation="leaky_relu",
    ),
    "conv1d": Net(
        nets.Conv1dEncoder,
        _without_hidden(nets.Conv1dDecoder),
        "conv for signals, (channels, length)",
        activation="silu",
        hidden=256,
        event=nets.SIGNAL,
    ),
}

#: The activations, by name.
ACTIVATIONS: Mapping[str, nets.Activation] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def choose(name: str, value: str, table: Mapping[str, Any]) -> Any:
    """Returns the entry of a table, or raises a `ValueError` that lists the names of the table.

    >>> choose("net", "cnn", NETS)
    Traceback (most recent call last):
    ValueError: net must be one of conv, mlp, gated, resnet, course, deep, conv1d, not 'cnn'
    """
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)}, not {reprlib.repr(value)}")
    return table[value]


# least scale of p(z1 | z2): a unit that z2 determines would narrow until float32 has no gradient
_FLOOR = 0.01
_HIDDEN = 256  # default width of networks between latents and of baselines, for nets without one


_MOST_LAYERS = 100


def _are_sizes(value: Any) -> bool:
    """Returns whether `value` is a tuple of 1 to 8 sizes that a tensor can have."""
    return (
        isinstance(value, tuple)
        and 1 <= len(value) <= 8
        and all(type(size) is int and 1 <= size < 2**63 for size in value)
    )


@dataclass(frozen=True)
class Recipe:
    """The names and sizes that define a pair: the arguments of `build` without the mean image.

    Every checkpoint holds the recipe of its pair. `None` stands for the default of a part: the
    net's activation and hidden width, the prior's number of components.

    Raises:
        ValueError: a name is not in its table, a number is out of its range, the chosen parts do
            not use an argument, or two parts do not fit together.

    >>> Recipe((1, 8, 8), (2,), net="course", hidden=100)
    Traceback (most recent call last):
    ValueError: hidden must be None, not 100: net 'course' has no hidden width to choose
    """

    event_shape: tuple[int, ...]
    latent_dims: tuple[int, ...]
    net: str = "conv"
    likelihood: str = "bernoulli"
    guide: str = "normal"
    prior: str = "standard_normal"
    hidden: int | None = None
    activation: str | None = None
    num_classes: int | None = None
    side_dim: int | None = None
    components: int | None = None
    num_data: int | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        choose("likelihood", self.likelihood, LIKELIHOODS)
        choose("guide", self.guide, GUIDES)
        choose("net", self.net, NETS)
        choose("prior", self.prior, PRIORS)
        choose("activation", self.own_activation, ACTIVATIONS)
        for name in ("hidden", "num_classes", "side_dim", "components", "num_data"):
            size = getattr(self, name)
            if size is not None and not _are_sizes((size,)):
                raise ValueError(
                    f"{name} must be a whole number of at least 1, not {reprlib.repr(size)}"
                )
        if not _are_sizes(self.event_shape):
            raise ValueError(
                "event_shape must be a tuple of whole numbers of at least 1, not "
                f"{reprlib.repr(self.event_shape)}"
            )
        if not _are_sizes(self.latent_dims) or len(self.latent_dims) > _MOST_LAYERS:
            raise ValueError(
                f"latent_dims must be the dimension of each latent layer, 1 to {_MOST_LAYERS} "
                f"whole numbers of at least 1, not {reprlib.repr(self.latent_dims)}"
            )
        if self.dropout is not None and not (
            type(self.dropout) in (int, float) and 0 <= self.dropout < 1
        ):
            raise ValueError(
                f"dropout must be a share of at least 0 and below 1, not {self.dropout!r}"
            )
        if self.num_classes is not None and self.side_dim is not None:
            raise ValueError(
                f"num_classes ({self.num_classes}) and side_dim ({self.side_dim}) are two kinds "
                "of y: give one"
            )
        self._refuse_unused()
        self._refuse_misfits()

    @property
    def own_activation(self) -> str:
        """The recipe's activation, or the net's default; the next two properties do the same."""
        return self.activation or NETS[self.net].activation

    @property
    def own_hidden(self) -> int:
        return self.hidden or NETS[self.net].hidden or _HIDDEN

    @property
    def own_components(self) -> int:
        return self.components or PRIORS[self.prior].components or 1

    @property
    def layered(self) -> bool:
        """Whether there are two latent layers or more."""
        return len(self.latent_dims) > 1

    def _refuse_unused(self) -> None:
        guide, prior = GUIDES[self.guide], PRIORS[self.prior]
        has_hidden = NETS[self.net].hidden is not None or self.layered or guide.baseline
        for name, used, why in (
            ("hidden", has_hidden, f"net {self.net!r} has no hidden width to choose"),
            ("components", prior.components is not None, f"prior {self.prior!r} has none"),
            ("num_data", not guide.amortized, f"guide {self.guide!r} has no use for it"),
            ("dropout", guide.amortized, f"guide {self.guide!r} has no encoder"),
        ):
            value = getattr(self, name)
            if value is not None and not used:
                raise ValueError(f"{name} must be None, not {value}: {why}")
        if self.num_data is None and not guide.amortized:
            raise ValueError(
                f"num_data must be the number of data, not None: guide {self.guide!r} has one "
                "factor for each"
            )

    def _refuse_misfits(self) -> None:
        guide, prior, event = GUIDES[self.guide], PRIORS[self.prior], NETS[self.net].event
        if event is not None and len(event) != len(self.event_shape):
            anything = ", ".join(name for name, net in NETS.items() if net.event is None)
            raise ValueError(
                f"event_shape must be ({', '.join(event)}), not {self.event_shape}: that is what "
                f"net {self.net!r} takes; the nets {anything} take data of any shape"
            )
        if prior.of_images and not guide.amortized:
            raise ValueError(
                f"prior {self.prior!r} puts pseudo-inputs through q(z|x), but guide "
                f"{self.guide!r} is no function of images: choose an amortized guide"
            )
        if prior.of_images and self.layered:
            raise ValueError(
                f"prior {self.prior!r} is a mixture of posteriors of images, but with several "
                "latent layers the prior is that of the last, whose posterior takes the one below: "
                "choose another prior"
            )
        if guide.ladder and not self.layered:
            raise ValueError(
                f"guide {self.guide!r} is for two latent layers or more, not for latent_dims "
                f"{self.latent_dims}: for one layer choose guide 'normal'"
            )
        if guide.baseline and self.layered:
            raise ValueError(
                f"guide {self.guide!r} has a baseline for one latent layer: with more choose "
                "another guide"
            )


def build(
    event_shape: Shape | None = None,
    latent_dims: int | Sequence[int] | None = None,
    net: str = "conv",
    likelihood: str = "bernoulli",
    guide: str = "normal",
    prior: str = "standard_normal",
    *,
    hidden: int | None = None,
    activation: str | None = None,
    num_classes: int | None = None,
    side_dim: int | None = None,
    components: int | None = None,
    num_data: int | None = None,
    dropout: float | None = None,
    mean_image: Tensor | None = None,
    image_shape: Shape | None = None,
    latent_dim: int | None = None,
) -> VAE:
    """Builds a VAE from names: the tables `NETS`, `LIKELIHOODS`, `GUIDES` and `PRIORS`.

    Args:
        event_shape: the shape of one datum: `(C, H, W)` for an image, by default `(1, 28, 28)`;
            `(C, L)` for a signal and the net "conv1d"; any shape for the nets "mlp" and "gated".
        latent_dims: the dimension of each latent layer, by default 16. One layer, `(32,)` or 32,
            makes the model `p(z) p(x | z)`. Two layers, `(40, 8)`, make the model
            `p(z2) p(z1 | z2) p(x | z1)` and the guide `q(z1 | x) q(z2 | z1)`, where z1 has 40
            dimensions and z2 has 8; up to 100 layers are possible.
        net, likelihood, guide: names in `NETS`, `LIKELIHOODS` and `GUIDES`.
        prior: a name in `PRIORS`; with several layers, the prior of the last one.
        hidden, activation: the hidden width and the activation of the networks. None takes the
            net's defaults: 256 and "silu" for "conv", "mlp" and "conv1d"; 300 and "identity" for
            "gated"; 64 (channels) and "silu" for "resnet"; "relu" for "course" and "leaky_relu"
            for "deep", which have no hidden width. The published form of "conv" has 16 and "relu".
        num_classes: makes the pair conditional on labels `y` `(B,)` from 0 to `num_classes - 1`:
            `p(x | z, y)` and `q(z | x, y)`. Encoder and decoder take the one-hot label too.
        side_dim: makes the pair conditional on side vectors `y` `(B, side_dim)` instead.
        components: the number of components of the priors "mixture" and "vamp", by default 50.
        num_data: the number of data, for the guide "per_datum", which holds a factor for each.
        dropout: the share of the encoder's input that is set to 0 at random in training: most of a
            pair's overfitting is in the encoder.
        mean_image: the mean of the data, `event_shape` (of images in [0, 1]). The decoder's output
            bias starts at it; without it a run may stay at the collapsed solution for epochs.
        image_shape, latent_dim: other names of `event_shape` and `latent_dims`.

    Raises:
        ValueError: `Recipe` refuses an argument, both names of one argument are given, or
            `mean_image` has another shape, is not floating point, or is not finite.

    >>> vae = build((3, 20, 16), latent_dim=4, net="mlp", likelihood="gaussian_shared")
    >>> vae.reconstruct(torch.rand(2, 3, 20, 16)).shape
    torch.Size([2, 3, 20, 16])
    >>> build((1, 8, 8), latent_dim=2, num_classes=10).sample(y=torch.arange(10)).shape
    torch.Size([10, 1, 8, 8])
    >>> counts = build(event_shape=(64,), latent_dim=2, net="mlp", likelihood="poisson")
    >>> counts.sample(3).shape  # rates
    torch.Size([3, 64])
    >>> build((1, 8, 8), latent_dims=(4, 2), guide="iaf", prior="vamp")
    Traceback (most recent call last):
    ValueError: prior 'vamp' is a mixture of posteriors of images, but with several latent ...
    """
    shape = _either("event_shape", event_shape, "image_shape", image_shape, (1, 28, 28))
    dims = _either("latent_dims", latent_dims, "latent_dim", latent_dim, 16)
    recipe = Recipe(
        event_shape=_sizes(shape),
        latent_dims=_sizes(dims),
        net=net,
        likelihood=likelihood,
        guide=guide,
        prior=prior,
        hidden=hidden,
        activation=activation,
        num_classes=num_classes,
        side_dim=side_dim,
        components=components,
        num_data=num_data,
        dropout=dropout,
    )
    return compose(recipe, mean_image)


def _sizes(value: Any) -> tuple[Any, ...]:
    """Returns a tuple: a single size becomes a tuple of one. `Recipe` checks the sizes."""
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _either(name: str, value: Any, alias: str, other: Any, default: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(f"{name} ({value}) and {alias} ({other}) are one argument: give one")
    return next((v for v in (value, other) if v is not None), default)


def compose(recipe: Recipe, mean_image: Tensor | None = None) -> VAE:
    """Builds the pair of a recipe; `mean_image` is the same as in `build`.

    >>> compose(Recipe((1, 8, 8), (2,))).sample().shape
    torch.Size([1, 1, 8, 8])
    """
    family, guide = LIKELIHOODS[recipe.likelihood], GUIDES[recipe.guide]
    posterior = _posterior(recipe, guide)  # for a ladder, its first step up
    likelihood = _likelihood(recipe, family, mean_image)
    prior = PRIORS[recipe.prior].make(recipe, recipe.latent_dims[-1], posterior, mean_image)
    pairs = list(pairwise(recipe.latent_dims))  # each layer and the one above it
    oracle = None
    if pairs:
        down = [
            _between(recipe, above, heads.Normal((dim,), min_scale=_FLOOR))
            for dim, above in reversed(pairs)
        ]
        model = HierarchicalModel(prior, *down, likelihood)
        vae = VAE(model, _layered_guide(recipe, guide, model, posterior))
    else:
        vae = VAE(Model(prior, likelihood), Guide(posterior, _baseline(recipe, guide)))
        if guide.split is not None and PRIORS[recipe.prior].standard:
            oracle = ClosedForm(
                encode=posterior.raw,
                decode=likelihood.raw,
                split=guide.split,
                log_likelihood=partial(family.log_likelihood, likelihood.head),
            )
    vae.describe(recipe, oracle)
    return vae


class _Features(nn.Module):
    """Takes the place of a head in a ladder's steps up: returns features `(*, B, width)`."""

    def __init__(self, width: int, activation: nets.Activation) -> None:
        super().__init__()
        self.param_shape = torch.Size((width,))
        self.activation = activation()

    def forward(self, h: Tensor) -> Tensor:
        return self.activation(h)


def _layered_guide(
    recipe: Recipe, guide: Posterior, model: HierarchicalModel, first: Conditional
) -> HierarchicalGuide | LadderGuide:
    """Makes the guide of two layers or more; `first` is the part that takes the data."""
    if not guide.ladder:
        pairs = pairwise(recipe.latent_dims)
        up = [_between(recipe, dim, guide.head((above,))) for dim, above in pairs]
        return HierarchicalGuide(first, *up)
    width = recipe.own_hidden
    further = [_between(recipe, width, _features(recipe)) for _ in recipe.latent_dims[1:]]
    estimates = [_between(recipe, width, guide.head((dim,))) for dim in recipe.latent_dims]
    return LadderGuide(model, [first, *further], estimates)


def _features(recipe: Recipe) -> _Features:
    return _Features(recipe.own_hidden, _activation(recipe))


def _activation(recipe: Recipe) -> nets.Activation:
    return ACTIVATIONS[recipe.own_activation]


def number_of_parameters(recipe: Recipe) -> int:
    """Counts the parameters of the pair that `compose` makes of a recipe, without making the pair.

    The parts are built on the meta device, which takes no memory. Flows cannot be built there,
    because Pyro reads the values of their masks: the weights of a flow are counted, but not the
    outputs that it adds to the encoder. So the count is a lower bound.

    Raises:
        ValueError: `compose` refuses the recipe, or a size is too large for any tensor.

    >>> number_of_parameters(Recipe((1, 28, 28), (2,), "mlp"))
    404244
    """
    guide, prior = GUIDES[recipe.guide], PRIORS[recipe.prior]
    made = [_flow_size(dim, 16, guide.flow) for dim in recipe.latent_dims]  # 16 of context
    made.append(_flow_size(recipe.latent_dims[-1], 0, prior.flow))
    without = replace(
        recipe,
        guide=recipe.guide if guide.flow is None else "normal",
        prior=recipe.prior if prior.flow is None else "standard_normal",
    )
    try:
        with torch.device("meta"):
            made += [p.numel() for p in compose(without).parameters()]
    except (OverflowError, RuntimeError, TypeError) as error:  # of sizes beyond 64 bits
        raise ValueError(f"no tensor has sizes as large as {recipe} needs") from error
    return sum(made)


def _flow_size(dim: int, context: int, kind: flows.Kind | None) -> int:
    """Counts the parameters of a flow: two transforms, each a network with one hidden layer."""
    if kind is None:
        return 0
    hidden, out = max(32, dim), dim * sum(kind[0])
    return 2 * ((dim + context + 1) * hidden + (hidden + 1) * out)


def _join(recipe: Recipe, event_dim: int, flatten: bool = False) -> ConcatVector | None:
    """Makes the join of `y` and a network's input; None for a pair that takes no `y`."""
    if recipe.num_classes is not None:
        return ConcatLabel(recipe.num_classes, event_dim=event_dim, flatten=flatten)
    if recipe.side_dim is not None:
        return ConcatVector(recipe.side_dim, event_dim=event_dim, flatten=flatten)
    return None


def _joined(join: ConcatVector | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one input after the join."""
    return shape if join is None else join.joined_shape(shape)


def _posterior(recipe: Recipe, guide: Posterior) -> Conditional:
    """Makes `q(z | x, y)`, or `q(z | index)` for a guide that is not amortized."""
    head: Any = _features(recipe) if guide.ladder else guide.head(recipe.latent_dims[:1])
    if not guide.amortized:
        assert recipe.num_data is not None
        table = nn.Embedding(recipe.num_data, head.param_shape[0])
        nn.init.zeros_(table.weight)  # every factor starts at N(0, I)
        without_y = None if _join(recipe, 1) is None else ignore_label
        return Conditional(table, head, event_dim=0, join=without_y)
    net = NETS[recipe.net]
    join = _join(recipe, len(recipe.event_shape), flatten=net.flat)
    shape = _joined(join, recipe.event_shape)
    encoder = net.encoder(shape, head.param_shape, recipe.own_hidden, _activation(recipe))
    return Conditional(_taking(recipe, encoder), head, event_dim=len(shape), join=join)


def _taking(recipe: Recipe, net: nn.Module) -> nn.Module:
    """The net, after the module that prepares the likelihood's data (if any) and after dropout."""
    taken = LIKELIHOODS[recipe.likelihood].taken
    first = [] if taken is None else [taken()]
    if recipe.dropout:
        first.append(nn.Dropout(recipe.dropout))
    return nn.Sequential(*first, net) if first else net


def _likelihood(recipe: Recipe, family: Likelihood, mean_image: Tensor | None) -> Conditional:
    """Makes `p(x | z, y)`."""
    head, join = family.head(recipe.event_shape), _join(recipe, 1)
    shape = _joined(join, recipe.latent_dims[:1])
    net = NETS[recipe.net].decoder
    decoder: Any = net(shape, head.param_shape, recipe.own_hidden, _activation(recipe))
    if mean_image is not None:
        _check_mean(mean_image, recipe.event_shape)
        decoder.set_output_bias(head.raw_mean(mean_image))
    return Conditional(decoder, head, event_dim=1, join=join)


def _check_mean(mean_image: Tensor, shape: tuple[int, ...]) -> None:
    kind = f"{mean_image.dtype} of shape {tuple(mean_image.shape)}"
    if mean_image.shape != shape or not mean_image.is_floating_point():
        raise ValueError(f"mean_image must be floats of shape {shape}, not {kind}")
    if not mean_image.isfinite().all():
        raise ValueError("mean_image must be finite, not have NaN or infinity")


def _between(recipe: Recipe, in_dim: int, head: Any) -> Conditional:
    """Makes the conditional distribution of one latent given another, by a small network."""
    join, own = _join(recipe, 1), NETS[recipe.net]
    make = own.encoder if own.flat else _mlp  # a flat net also takes vectors
    shape = _joined(join, (in_dim,))
    net = make(shape, head.param_shape, recipe.own_hidden, _activation(recipe))
    return Conditional(net, head, event_dim=1, join=join)


def _baseline(recipe: Recipe, guide: Posterior) -> nn.Module | None:
    if not guide.baseline:
        return None
    # the cost of a datum grows with its number of elements
    size = nets.Affine(math.prod(recipe.event_shape), 0)
    net = _taking(recipe, nets.MLP(recipe.event_shape, (1,), (recipe.own_hidden,)))
    return nn.Sequential(net, size)
