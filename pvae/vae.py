"""The class `VAE`, a pair of Pyro programs, with methods to use a trained pair."""

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae import objectives
from pvae.closed_form import ClosedForm, Terms
from pvae.kinds import Distribution, Fn, Latents, Message, Trace
from pvae.programs import (
    Guide,
    HierarchicalGuide,
    HierarchicalModel,
    LadderGuide,
    Model,
    evaluating,
    mean_of,
    optional,
)

_TAKES = {
    constraints.boolean: "0 and 1. Binarise the data, or choose a likelihood for grey pixels",
    constraints.nonnegative_integer: "counts, whole numbers of at least 0. Choose a likelihood for "
    "real numbers, such as gaussian_shared",
    constraints.unit_interval: "numbers in [0, 1]. Choose a likelihood for real numbers, such as "
    "gaussian_shared",
}


class _AtMeans(Messenger):
    """A handler that sets every latent to its distribution's mean instead of a draw."""

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and not poutine.util.site_is_subsample(msg):
            msg["value"], msg["done"] = mean_of(msg["fn"]), True


class VAE(nn.Module):
    r"""A pair of Pyro programs, `vae.model = p(z) p(x|z)` and `vae.guide = q(z|x)`.

    Any stock Pyro tool takes the two programs; the methods here use a trained pair. Images are
    `(B, C, H, W)` floats, latents `(*, B, D)`; `y` holds labels `(B,)` or side vectors `(B, S)`,
    for a pair that is conditional on them. Every method that returns images runs in eval mode: it
    restores the pair's mode, and it does not change BatchNorm's running statistics.

    Args:
        model: a `pvae.Model`, or any Pyro program with a `prior`, a `likelihood` and `densities`.
        guide: a `pvae.Guide`, or any Pyro program with a `posterior` and `densities`.
        oracle: the hand-written ELBO of this pair, if there is one.

    >>> import pvae
    >>> vae = pvae.build(image_shape=(1, 8, 8), latent_dim=2)
    >>> vae.sample(3).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model | HierarchicalModel,
        guide: Guide | HierarchicalGuide | LadderGuide,
        oracle: ClosedForm | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model  # any program with the attributes named above
        self.guide: Any = guide
        self.describe(None, oracle)

    def describe(self, recipe: Any, oracle: ClosedForm | None) -> None:
        """Keeps the `pvae.builder.Recipe` and the hand-written ELBO of the pair. Both describe the
        pair's present parts: when a part is replaced, `recipe` and `oracle` become None."""
        self._recipe, self._oracle, self._described = recipe, oracle, self._parts()

    def _parts(self) -> tuple[nn.Module, ...]:
        return *self.model.modules(), *self.guide.modules()

    def _as_described(self) -> bool:
        now = self._parts()
        same = len(now) == len(self._described)
        return same and all(a is b for a, b in zip(now, self._described, strict=True))

    @property
    def recipe(self) -> Any:
        """The recipe of a pair that `build` made; None once a part of the pair is replaced."""
        return self._recipe if self._as_described() else None

    @property
    def oracle(self) -> ClosedForm | None:
        """The hand-written ELBO, where there is one; None once a part of the pair is replaced."""
        return self._oracle if self._as_described() else None

    @property
    def takes_y(self) -> bool:
        """Whether the pair is conditional on `y`: one of its modules has `takes_y = True`."""
        modules = (*self.model.modules(), *self.guide.modules())
        return any(getattr(module, "takes_y", False) for module in modules)

    @property
    def normalized(self) -> bool:
        """Whether `p(x|z)` integrates to 1: no module of the model has `normalized = False`."""
        return all(getattr(module, "normalized", True) for module in self.model.modules())

    def given(self, y: Tensor | None) -> Tensor | None:
        """Returns `y` for a pair that takes it, else None, whatever `y` the data has."""
        return y if self.takes_y else None

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """The posterior `q(z|x)`, or `q(z1|x)` of several layers: batch shape `(B,)`, event `(D,)`.

        Raises:
            ValueError: `x` is not a batch of finite floating point images of the pair's shape, or
                the guide has one factor for each datum and none for new images.
        """
        if getattr(self.guide.posterior, "event_dim", None) == 0:
            raise ValueError(
                "this guide holds one factor for each datum, q(z | index), and has none for new "
                "images: call it with index=..., or choose an amortized guide"
            )
        if not x.is_floating_point() or not x.isfinite().all():
            bad = "is not floating point" if not x.is_floating_point() else "has NaN or infinity"
            raise ValueError(f"x {bad} (dtype {x.dtype}); images are floats in [0, 1]")
        return self.guide.posterior(x, *optional(y))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """The likelihood `p(x|z)`, batch shape `(*, B)`, event shape `(C, H, W)`."""
        return self.model.likelihood(z, *optional(y))

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean images at the posterior means, `(B, C, H, W)`; raises the errors of `encode`."""
        with evaluating(self):
            self.encode(x, y)  # raises its errors
            with _AtMeans():
                trace = poutine.trace(self.guide).get_trace(x, y)
            return _mean_image(poutine.replay(self.model, trace), x, y)

    def sample(self, n: int = 1, y: Tensor | None = None) -> Tensor:
        """Mean images at `n` draws from the prior, or at one draw for each label of `y`.

        Raises:
            ValueError: `n` is below 1, or is neither 1 nor the number of labels.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if y is not None and n not in (1, len(y)):
            raise ValueError(f"n must be left out, or {len(y)}, the length of y, not {n}")
        with evaluating(self):
            return _mean_image(self.model, None, y, size=n)

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
            a, b = mean_of(self.encode(start, y)), mean_of(self.encode(end, y))  # (B, D)
            weights = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
            z = torch.lerp(a, b, weights[:, None, None])  # (steps, B, D)
            return self.decode(z, y).mean.transpose(0, 1)

    def terms(self, x: Tensor, latents: Latents, y: Tensor | None = None) -> Terms:
        """The ELBO's terms at `latents`, draws `(*, B, D)` by site, without any Pyro handler: from
        the oracle if there is one, else from the distributions' own densities."""
        if self.oracle is not None:
            return self.oracle.terms(x, y, z=latents["z"])
        log_q = self.guide.densities(x, latents, y)
        log_p = self.model.densities(x, latents, y)
        reconstruction = log_p.pop("x")
        kl_sampled: Any = sum(log_q.values()) - sum(log_p.values())
        units = self._kl_by_unit(x, y) if len(log_q) == 1 else None
        kl = None if units is None else units.sum(-1).expand_as(reconstruction)
        return Terms(reconstruction, kl, kl_sampled, units)

    def _kl_by_unit(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        """`(B, D)`; None unless both distributions factorize and torch has the formula."""
        prior = self.model.prior(*optional(y))
        return objectives.kl_by_unit(self.encode(x, y), prior)

    def check(self, x: Tensor, y: Tensor | None = None, further: Sequence[Tensor] = ()) -> None:
        """Checks, before a long run starts, that the pair can be trained on images like `x`, and
        that the values of the `further` images are in the likelihood's support too.

        Raises:
            ValueError: wrong shape or dtype, NaN, or values outside the likelihood's support.
        """
        # at a draw, since not every posterior has a mean; the random state is restored
        with evaluating(self), torch.random.fork_rng([x.device] if x.is_cuda else []):
            p = self.decode(self.encode(x, y).sample(), y)
        if p.event_shape != x.shape[1:]:
            raise ValueError(
                f"x holds images of shape {tuple(x.shape[1:])}, "
                f"but the likelihood is over {tuple(p.event_shape)}"
            )
        elements: Any = getattr(p, "base_dist", p)  # the distribution inside `to_event`
        for part in (x, *further):
            outside = sum(int((~elements.support.check(t)).sum()) for t in part.split(10_000))
            if outside:
                takes = _TAKES.get(elements.support) or textwrap.shorten(f"{elements.support}", 80)
                raise ValueError(
                    f"x has values outside the likelihood's support ({outside:,} of "
                    f"{part.numel():,}; x lies in [{part.min():.3g}, {part.max():.3g}]): "
                    f"{type(elements).__name__.lstrip('_')} takes {takes}"
                )


def _mean_image(model: Fn, x: Tensor | None, y: Tensor | None, size: int = 1) -> Tensor:
    """The mean of `p(x | latents)` at the latents that `model` draws, `(B, C, H, W)`."""
    trace: Trace = poutine.trace(model).get_trace(x, y, size=size)
    return trace.nodes["x"]["fn"].mean
