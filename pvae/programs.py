r"""The Pyro programs of a VAE: the model `p(z) p(x|z)` and the guide `q(z|x)`, and further pairs.

All are plain Pyro: stock `SVI`, `Predictive`, `ELBOModule`, `RenyiELBO` and `poutine.trace` work
on them. The sites are `z` and `x`, or `z1`, `z2`, ... and `x`, and `y` where the label is a latent
too; the plate is `data`.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from pvae.kinds import Distribution, Fn, Latents

Sample = Callable[..., Tensor]  # `pyro.sample`, or a function called in the same way
_MEAN_DRAWS = 100  # for a posterior whose mean has no formula

_numbers = itertools.count()


def _entry(name: str, parameter: Tensor) -> Any:
    """Makes a state for `set_state` of Pyro's store, which then holds this very parameter."""
    return {"params": {name: parameter}, "constraints": {name: constraints.real}}


def _forget(name: str) -> None:
    """Removes a name from Pyro's store.

    Two programs that share a module give each of its parameters two names. The store maps a
    parameter back to only one of them, and cannot delete the other: this function corrects the map
    before and after the deletion.
    """
    store = pyro.get_param_store()
    parameter = dict(store.named_parameters())[name]
    store.set_state(_entry(name, parameter))
    del store[name]
    for other in [n for n, p in store.named_parameters() if p is parameter]:
        store.set_state(_entry(other, parameter))


def _leave_store(prefix: str) -> None:
    for name in [name for name in pyro.get_param_store() if name.startswith(prefix)]:
        _forget(name)


@contextlib.contextmanager
def evaluating(*programs: Fn) -> Iterator[None]:
    """Runs the block without gradients, the modules among `programs` in eval mode; restores them.

    >>> net = nn.Dropout()
    >>> with evaluating(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    training = [m.training for m in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was


def mean_of(p: Distribution) -> Tensor:
    """The mean of a distribution, or of 100 draws where there is no formula, as for a flow.

    The global random state does not change.

    >>> import pyro.distributions as dist
    >>> mean_of(dist.Normal(torch.ones(2), 1.0))
    tensor([1., 1.])
    """
    try:
        return p.mean
    except NotImplementedError:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return p.sample((_MEAN_DRAWS,)).mean(0)


class Program(nn.Module):
    """An `nn.Module` that keeps its parameters in Pyro's store under a name of its own.

    Pyro's store is global and finds parameters by name, so each *object* has its own name: a
    second VAE, a deep copy and an unpickled object get new names. When an object is deleted, its
    names are removed from the store. Save a `state_dict`, never the store.
    """

    _unique_name: str

    def __init__(self) -> None:
        super().__init__()
        self._draw_name()

    def _draw_name(self) -> None:
        self._unique_name = f"pvae.{type(self).__name__}-{next(_numbers)}"
        leave = weakref.finalize(self, _leave_store, self._unique_name + "$$$")
        leave.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        # Pyro leaves a weak reference on each parameter, which cannot be pickled
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._draw_name()

    def register(self) -> None:
        """Makes the parameters known to the Pyro handlers around this call."""
        store = pyro.get_param_store()
        known = dict(store.named_parameters())
        for path, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue  # frozen on purpose; pyro.module would warn
            name = f"{self._unique_name}$$${path}"  # pyro.module's own naming
            # The parameter is new or replaced (load_state_dict with assign=True): the store must
            # hold this very parameter. pyro.param would keep the old one, or a contiguous copy of
            # a channels_last one; SVI would train that one, and the module would not change.
            if known.get(name) is not parameter:
                if name in known:
                    _forget(name)
                store.set_state(_entry(name, parameter))
            pyro.param(name, parameter)


def optional(y: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the arguments `(y,)`, or no arguments if `y` is None: a module that takes no `y`,
    such as an `nn.Sequential`, can then be called in the same way."""
    return () if y is None else (y,)


def _check_images(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"x has dtype {x.dtype}; the programs take floating point data (images in [0, 1]): "
            "see pvae.data.pixels"
        )
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a batch (B, C, H, W) with B >= 1 is needed"
        )


def _batch_size(x: Tensor | None, y: Tensor | None, size: int) -> int:
    if x is not None:
        _check_images(x)
        return len(x)
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    return size if y is None else len(y)


def _observe(p: Any, x: Tensor | None) -> Tensor:
    """Samples the site `x`, or scores the given `x`."""
    if x is not None and x.shape[1:] != p.event_shape:
        raise ValueError(
            f"x holds images of shape {tuple(x.shape[1:])}, "
            f"but the likelihood is over {tuple(p.event_shape)}"
        )
    return pyro.sample("x", p, obs=x)


def _datum(x: Tensor | None, index: Tensor | None) -> Tensor:
    """Returns the input of the posterior: the images, or the data's index if it is given."""
    if index is not None:
        return index
    if x is None:
        raise ValueError("x is missing: the guide is a posterior given data")
    _check_images(x)
    return x


def _log_densities(draw: Callable[[Sample], Tensor], latents: Latents) -> dict[str, Tensor]:
    """The log density of each site that `draw` samples, at the given `latents`."""
    log_p = {}

    def score(name: str, p: Distribution, infer: Any = None) -> Tensor:
        log_p[name] = p.log_prob(latents[name])
        return latents[name]

    draw(score)
    return log_p


class _Generative(Program):
    """Base of the models: the latents, then `p(x | z, y)`; a subclass defines `draw`.

    `lowest` names the site that the likelihood takes.
    """

    likelihood: nn.Module
    lowest = "z"

    def draw(self, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        """Samples all latents; returns the one that the likelihood takes."""
        raise NotImplementedError

    def densities(self, x: Tensor, latents: Latents, y: Tensor | None = None) -> dict[str, Tensor]:
        """`log p` of `x` and of each latent given the layers above it, by site, `(*, B)` in nats.

        `latents` holds a draw `(*, B, D)` for each site. Pyro's handlers are not used.
        """
        log_p = _log_densities(partial(self.draw, y), latents)
        likelihood = self.likelihood(latents[self.lowest], *optional(y))
        return {**log_p, "x": likelihood.log_prob(x)}

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        size: int = 1,
    ) -> Tensor:
        """Samples the latents and `x` (or scores the given `x`); returns `x`. Only the guide uses
        `index`."""
        self.register()
        with pyro.plate("data", _batch_size(x, y, size)):
            z = self.draw(y)
            return _observe(self.likelihood(z, *optional(y)), x)


class Model(_Generative):
    r"""The generative program `p(z | y) p(x | z, y)`.

    Args:
        prior: a module with `prior()` or `prior(y)`, a distribution over `z`.
        likelihood: a module with `likelihood(z)` or `likelihood(z, y)`, a distribution over `x`.

    Call it with `x` of shape `(B, C, H, W)` to condition on data, or with `size` to generate.
    Raises `ValueError` where `x` is not floating point, empty, or not of the likelihood's shape, or
    `size` is below 1.
    Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114.

    >>> from pvae.heads import NormalFixedScale
    >>> from pvae.priors import StandardNormal
    >>> model = Model(StandardNormal(2), nn.Sequential(nn.Linear(2, 5), NormalFixedScale((5,))))
    >>> model(size=3).shape
    torch.Size([3, 5])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def draw(self, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        return sample("z", self.prior(*optional(y)))


class _Inference(Program):
    """Base of the guides: the latents given `x` or the data's index; a subclass defines `draw`."""

    def draw(self, datum: Tensor, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        """Samples all latents; returns the last."""
        raise NotImplementedError

    def densities(self, x: Tensor, latents: Latents, y: Tensor | None = None) -> dict[str, Tensor]:
        """`log q` of each latent by site, `(*, B)` in nats, without Pyro's handlers."""
        return _log_densities(partial(self.draw, x, y), latents)

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        index: Tensor | None = None,
        size: int = 1,
    ) -> Tensor:
        """Samples the latents given `x` `(B, C, H, W)`, or given the data's `index` `(B,)`."""
        self.register()
        datum = _datum(x, index)
        with pyro.plate("data", len(datum)):
            return self.draw(datum, y)


class Guide(_Inference):
    r"""The amortized posterior `q(z | x, y)`, or `q(z | index)` with one factor for each datum.

    Args:
        posterior: a module with `posterior(x)` or `posterior(x, y)`, a distribution over `z`.
        baseline: for a posterior that is not reparameterized, a network `(B, ...) -> (B, 1)` that
            learns to predict each image's cost. `TraceGraph_ELBO` subtracts the prediction from
            the coefficient of the score function: the gradient stays unbiased, its variance falls.

    Source of the baseline: Neural Variational Inference and Learning (2014), arXiv:1402.0030.

    >>> import torch
    >>> from pvae.heads import Normal
    >>> guide = Guide(nn.Sequential(nn.Linear(5, 4), Normal((2,))))
    >>> guide(torch.zeros(3, 5)).shape
    torch.Size([3, 2])
    """

    def __init__(self, posterior: nn.Module, baseline: nn.Module | None = None) -> None:
        super().__init__()
        self.posterior = posterior
        self.baseline = baseline

    def draw(self, datum: Tensor, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        infer: Any = {} if self.baseline is None else _baseline(self.baseline, datum)
        return sample("z", self.posterior(datum, *optional(y)), infer=infer)


def _baseline(net: nn.Module, datum: Tensor) -> dict[str, Any]:
    """Options for `TraceGraph_ELBO`: `net` learns to predict the cost of each image, `(B, 1)`,
    which Pyro takes as `(B,)`."""
    return {"baseline": {"nn_baseline": lambda v: net(v).squeeze(-1), "nn_baseline_input": datum}}


class HierarchicalModel(_Generative):
    r"""The model of several layers, `p(zL | y) ... p(z2 | z3, y) p(z1 | z2, y) p(x | z1, y)`.

    The arguments are in the order of this product. The sites are `z1` to `zL`.

    Args:
        top: a module with `top()` or `top(y)`, the prior of `zL`.
        below: for each lower layer, from above, a module with `prior(z)` or `prior(z, y)`, a
            distribution over this layer given the layer above; then the likelihood, a module with
            `likelihood(z1)` or `likelihood(z1, y)`, a distribution over `x`.

    It is called like `Model`. Raises `ValueError` if there are fewer than two layers.
    Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114; Ladder Variational
    Autoencoders (2016), arXiv:1602.02282.

    >>> from pvae.heads import Normal, NormalFixedScale
    >>> from pvae.priors import StandardNormal
    >>> middle = nn.Sequential(nn.Linear(2, 8), Normal((4,)))  # p(z2 | z3)
    >>> lowest = nn.Sequential(nn.Linear(4, 6), Normal((3,)))  # p(z1 | z2)
    >>> likelihood = nn.Sequential(nn.Linear(3, 5), NormalFixedScale((5,)))
    >>> HierarchicalModel(StandardNormal(2), middle, lowest, likelihood)(size=4).shape
    torch.Size([4, 5])
    """

    lowest = "z1"

    def __init__(self, top: nn.Module, *below: nn.Module) -> None:
        super().__init__()
        if len(below) < 2:
            raise ValueError(
                "below must be at least two modules, the prior of z1 and the likelihood, not "
                f"{len(below)}: for one layer use pvae.Model"
            )
        *between, prior, likelihood = below
        self.top, self.prior, self.likelihood = top, prior, likelihood
        self.between = nn.ModuleList(between)  # priors of the layers between zL and z1, from above

    def draw(self, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        priors = [*self.between, self.prior]
        z = sample(f"z{len(priors) + 1}", self.top(*optional(y)))
        for number, prior in zip(range(len(priors), 0, -1), priors, strict=True):
            z = sample(f"z{number}", prior(z, *optional(y)))
        return z


class HierarchicalGuide(_Inference):
    r"""The guide that draws from below, `q(z1 | x, y) q(z2 | z1, y) ... q(zL | z(L-1), y)`.

    Model and guide draw the layers in opposite orders, so the KL of one site depends on the draw of
    another site: Pyro's `TraceMeanField_ELBO` would be wrong here, and `pvae.objectives.MeanField`
    raises an error.

    Args:
        posterior: a module with `posterior(x)` or `posterior(x, y)`, a distribution over `z1`.
        above: for each upper layer, from below, a module with `q(z)` or `q(z, y)`, a distribution
            over this layer given the layer below.

    Raises `ValueError` if there are fewer than two layers.

    >>> from pvae.heads import Normal
    >>> posterior = nn.Sequential(nn.Linear(5, 6), Normal((3,)))
    >>> middle = nn.Sequential(nn.Linear(3, 8), Normal((4,)))  # q(z2 | z1)
    >>> top = nn.Sequential(nn.Linear(4, 4), Normal((2,)))  # q(z3 | z2)
    >>> HierarchicalGuide(posterior, middle, top)(torch.zeros(4, 5)).shape
    torch.Size([4, 2])
    """

    def __init__(self, posterior: nn.Module, *above: nn.Module) -> None:
        super().__init__()
        if not above:
            raise ValueError(
                "above must be at least one module, q(z2 | z1), not none: for one layer use "
                "pvae.Guide"
            )
        *between, top = above
        self.posterior, self.top = posterior, top
        self.between = nn.ModuleList(between)  # of the layers z2 to z(L-1), from below

    def draw(self, datum: Tensor, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        z = sample("z1", self.posterior(datum, *optional(y)))
        for number, q in enumerate([*self.between, self.top], start=2):
            z = sample(f"z{number}", q(z, *optional(y)))
        return z


def _product(p: Any, q: Any) -> dist.Distribution:
    """The normal whose density is proportional to the product of two diagonal normal densities."""
    normals = [getattr(d, "base_dist", d) for d in (p, q)]
    for normal in normals:
        if not isinstance(normal, torch.distributions.Normal):
            raise ValueError(
                "a ladder's priors and estimates must be diagonal normals, not a "
                f"{type(normal).__name__}"
            )
    (m, s), (n, t) = [(normal.loc, normal.scale) for normal in normals]
    # variance 1 / (1/s^2 + 1/t^2), loc weighted by precision, without a power that overflows
    root = torch.hypot(s, t)
    return dist.Normal(m + (n - m) * (s / root) ** 2, s * (t / root)).to_event(1)


class LadderGuide(_Inference):
    r"""The guide that draws from above, by the model's priors, `q(zL | x, y) ... q(z1 | z2, x, y)`.

    The way up has no draws: `d1 = up1(x)`, `d2 = up2(d1)`, ... Each `d_l` gives the data's estimate
    of layer `l`, `r_l(z_l) = N(m_l, s_l^2)`. On the way down each layer multiplies this estimate by
    the model's own prior, `q(z_l | z_(l+1), x) ~ p(z_l | z_(l+1)) r_l(z_l)`. The product is a
    normal: its precision is the sum of the two precisions, and its loc is the mean of the two locs
    weighted by precision. At the top `q = r`.

    Model and guide draw the layers in the same order and share the parameters of the model's
    priors: give each parameter to the optimizer once, as `vae.parameters()` does.

    Args:
        model: a `HierarchicalModel` whose layers below the top are diagonal normals.
        up: for each layer, from below, a module with `up(v)` or `up(v, y)` that returns a tensor;
            the first takes `x`, each later one the tensor of the one before.
        estimates: for each layer, from below, a module with `r(d)` or `r(d, y)`, a diagonal normal
            over `z_l`.

    Raises:
        ValueError: `up` or `estimates` are not one module for each layer; when the guide is called,
            a prior below the top or an estimate is not a diagonal normal.

    Source: Ladder Variational Autoencoders (2016), arXiv:1602.02282.

    >>> from pvae.heads import Normal, NormalFixedScale
    >>> from pvae.priors import StandardNormal
    >>> lowest = nn.Sequential(nn.Linear(2, 6), Normal((3,)))  # p(z1 | z2)
    >>> likelihood = nn.Sequential(nn.Linear(3, 5), NormalFixedScale((5,)))
    >>> model = HierarchicalModel(StandardNormal(2), lowest, likelihood)
    >>> up = [nn.Linear(5, 8), nn.Linear(8, 8)]
    >>> estimates = [nn.Sequential(nn.Linear(8, 2 * d), Normal((d,))) for d in (3, 2)]
    >>> LadderGuide(model, up, estimates)(torch.zeros(4, 5)).shape
    torch.Size([4, 3])
    """

    def __init__(
        self, model: HierarchicalModel, up: Sequence[nn.Module], estimates: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.priors = nn.ModuleList([*model.between, model.prior])  # the model's own, from above
        self.up, self.estimates = nn.ModuleList(up), nn.ModuleList(estimates)
        layers = len(self.priors) + 1
        for name, modules in (("up", self.up), ("estimates", self.estimates)):
            if len(modules) != layers:
                raise ValueError(
                    f"{name} must be {layers} modules, one for each layer of the model, not "
                    f"{len(modules)}"
                )

    def draw(self, datum: Tensor, y: Tensor | None, sample: Sample = pyro.sample) -> Tensor:
        d, estimates = datum, []
        for number, (up, estimate) in enumerate(zip(self.up, self.estimates, strict=True), 1):
            d = up(d, *optional(y))
            estimates.append((f"z{number}", estimate(d, *optional(y))))
        site, q = estimates.pop()
        z = sample(site, q)
        for (site, r), prior in zip(reversed(estimates), self.priors, strict=True):
            z = sample(site, _product(prior(z, *optional(y)), r))
        return z

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """`q(z1 | z2, x, y)` with each layer above at its mean, batch shape `(B,)`."""
        drawn: list[Distribution] = []

        def at_mean(name: str, q: Distribution) -> Tensor:
            drawn.append(q)
            return mean_of(q)

        self.draw(x, y, at_mean)
        return drawn[-1]


def _classes(num_classes: int, like: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=like.new_zeros(num_classes))


class LabelModel(Program):
    r"""The generative program `p(y) p(z) p(x | z, y)`, the classes equally likely a priori.

    The label `y` `(B,)` is a site of its own. It is observed if it is given; otherwise it is a
    latent, which `LabelGuide` infers.

    Args:
        prior: a module with `prior()`, a distribution over `z`.
        likelihood: a module with `likelihood(z, y)`, a distribution over `x`; under enumeration
            `y` is `(K, 1)`.
        num_classes: `K`.

    Source: Semi-Supervised Learning with Deep Generative Models (2014), arXiv:1406.5298, model M2.

    >>> import torch
    >>> from pvae import ConcatLabel, Conditional
    >>> from pvae.heads import Bernoulli
    >>> from pvae.priors import StandardNormal
    >>> join = ConcatLabel(3)
    >>> likelihood = Conditional(nn.Linear(5, 4), Bernoulli((4,)), event_dim=1, join=join)
    >>> LabelModel(StandardNormal(2), likelihood, 3)(torch.ones(6, 4)).shape
    torch.Size([6, 4])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.num_classes = num_classes

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Scores images `x` `(B, C, H, W)` and, where given, their labels `y` `(B,)`."""
        self.register()
        _check_images(x)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", _classes(self.num_classes, x), obs=y)
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, y), obs=x)


class LabelGuide(Program):
    r"""The posterior `q(y | x) q(z | x, y)`; with a label given, `q(z | x, y)` alone.

    A label that is not given is marked for enumeration: `TraceEnum_ELBO(max_plate_nesting=1)` sums
    it out, `sum_y q(y|x) (...)`. Where all labels are given, use `Trace_ELBO`.

    Args:
        classifier: a module with `classifier(x)`, a categorical distribution over `y`.
        posterior: a module with `posterior(x, y)`, a distribution over `z`; under enumeration `y`
            is `(K, 1)`.

    Source: as `LabelModel`.

    >>> import torch
    >>> from pvae import ConcatLabel, Conditional
    >>> from pvae.heads import Normal
    >>> head = Normal((2,))
    >>> posterior = Conditional(nn.Linear(7, 4), head, event_dim=1, join=ConcatLabel(3))
    >>> class Classifier(nn.Linear):
    ...     def forward(self, x):
    ...         return dist.Categorical(logits=super().forward(x))
    >>> LabelGuide(Classifier(4, 3), posterior)(torch.ones(6, 4)).shape
    torch.Size([6, 2])
    """

    def __init__(self, classifier: nn.Module, posterior: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.posterior = posterior

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples `z` (and `y` where it is not given) for images `x` `(B, C, H, W)`."""
        self.register()
        _check_images(x)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", self.classifier(x), infer={"enumerate": "parallel"})
            return pyro.sample("z", self.posterior(x, y))
