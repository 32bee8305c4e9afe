"""The ELBO of each image with its terms, and functions that all evaluations share: fixed noise,
chunks of a split with a progress bar, means over images with their standard errors."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pvae.data import Split, chunks
from pvae.kinds import Fn, Trace
from pvae.objectives import latent_names
from pvae.programs import evaluating


@contextlib.contextmanager
def fixed_noise(device: torch.device | str, seed: int) -> Iterator[None]:
    """Inside the block draws come from `seed`; the global random state is restored.

    >>> with fixed_noise("cpu", 0):
    ...     a = torch.randn(2)
    >>> with fixed_noise("cpu", 0):
    ...     bool((torch.randn(2) == a).all())
    True
    """
    device = torch.device(device)
    with torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device],
        device_type=device.type if device.type != "cpu" else "cuda",
    ):
        torch.manual_seed(seed)
        yield


class Bound(NamedTuple):
    """The ELBO `reconstruction - kl` and its terms, each `(B,)`, in nats for each image.

    `kl` is also called the *rate*, the cost of the code z, and `-reconstruction` the *distortion*.
    Source: Fixing a Broken ELBO (2017), arXiv:1711.00464.
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


# ---- running a pair, and reading its traces: for the files of this package ----


def traces(
    model: Fn, guide: Fn, x: Tensor, y: Tensor | None, particles: int
) -> tuple[Trace, Trace]:
    """Traces of model and guide at `particles` draws of the latents: log_probs `(particles, B)`."""
    with pyro.plate("particles", particles, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(x, y)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, y)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return model_trace, guide_trace


def sum_sites(trace: Trace, names: list[str], shape: tuple[int, int]) -> Tensor:
    """The log_probs of the named sites, summed for each particle and image: `shape`."""
    total = torch.zeros(())
    for name in names:
        log_prob = trace.nodes[name]["log_prob"]
        if log_prob.shape[-1:] != shape[-1:]:
            raise ValueError(
                f"site {name!r} has log_prob of shape {tuple(log_prob.shape)}, one number for the "
                f"whole batch; every site must lie in the data plate (..., {shape[-1]})"
            )
        total = total.to(log_prob) + log_prob
    return total.expand(shape)


def not_finite(model: Fn, guide: Fn, x: Tensor, y: Tensor | None = None) -> str | None:
    """Returns the first site of guide and model whose draw or log density is not finite, None if
    all are finite.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> vae.guide.posterior.net.out.bias.data[0] = math.nan
    >>> not_finite(vae.model, vae.guide, torch.ones(5, 1, 8, 8))
    'z'
    """
    with evaluating(model, guide), fixed_noise(x.device, 0), pyro.validation_enabled(False):
        model_trace, guide_trace = traces(model, guide, x, y, 1)
    for trace in (guide_trace, model_trace):
        for name in [*latent_names(trace), *trace.observation_nodes]:
            site = trace.nodes[name]
            if not (site["value"].isfinite().all() and site["log_prob"].isfinite().all()):
                return name
    return None


# ---- the ELBO ----


def _analytic_kl(model_trace: Trace, guide_trace: Trace, shape: tuple[int, int]) -> Tensor | None:
    """KL(q(z|x) || p(z)) where there is one latent site and torch has the formula."""
    names = latent_names(guide_trace)
    if len(names) != 1:  # with several, the analytic KL of one depends on the draw of another
        return None
    q, p = guide_trace.nodes[names[0]]["fn"], model_trace.nodes[names[0]]["fn"]
    try:
        return torch.distributions.kl_divergence(q, p).expand(shape)
    except NotImplementedError:
        return None


def elbo(
    model: Fn, guide: Fn, x: Tensor, y: Tensor | None = None, *, num_samples: int = 1
) -> Bound:
    r"""The ELBO (beta = 1) of each image of a batch, averaged over `num_samples` draws.

    `log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))`. The KL is analytic if there is one latent
    site and torch has the formula, else sampled.

    Raises:
        ValueError: `num_samples` is below 1, or a site is outside the data plate.

    >>> import pvae
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> bound = elbo(vae.model, vae.guide, torch.ones(5, 1, 8, 8))
    >>> bound.elbo.shape
    torch.Size([5])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    shape = (num_samples, len(x))
    with evaluating(model, guide):
        model_trace, guide_trace = traces(model, guide, x, y, num_samples)
        reconstruction = sum_sites(model_trace, model_trace.observation_nodes, shape)
        kl = _analytic_kl(model_trace, guide_trace, shape)
        if kl is None:
            log_q = sum_sites(guide_trace, latent_names(guide_trace), shape)
            kl = log_q - sum_sites(model_trace, latent_names(model_trace), shape)
        reconstruction, kl = reconstruction.mean(0), kl.mean(0)
    return Bound(reconstruction - kl, reconstruction, kl)


def bits_per_dimension(nats: Tensor, elements: int, *, levels: int = 1) -> Tensor:
    r"""`(D log levels - nats) / (D log 2)`, `nats` a bound on the log density of `D` elements.

    Use it for discrete data only. Binary pixels have a probability: `levels = 1`. Pixels of 256
    grey levels, dequantised to [0, 1], have a density; a level is 1/256 wide, so `levels = 256`,
    and the result is an upper bound (by Jensen's inequality) on the bits of the levels themselves.
    Source: A note on the evaluation of generative models (2015), arXiv:1511.01844.

    >>> bits_per_dimension(torch.tensor([-784 * math.log(2)]), 784)  # a fair coin for each pixel
    tensor([1.])
    >>> bits_per_dimension(torch.zeros(1), 784, levels=256)  # uniform on [0, 1]
    tensor([8.])
    """
    return (math.log(levels) - nats / elements) / math.log(2)


# ---- over images ----


class Estimate(NamedTuple):
    """A mean over images and its standard error."""

    mean: float
    se: float


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error over images `(N,)`; the error is NaN for a single image.

    >>> estimate(torch.tensor([1.0, 3.0]))
    Estimate(mean=2.0, se=1.0)
    """
    values = values.cpu().double()  # not every device has float64
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), se)


def over(
    split: Split,
    function: Callable[[Tensor, Tensor | None], Any],
    *,
    batch_size: int,
    seed: int,
    title: str = "",
) -> Any:
    """Applies `function(x, y)` to a whole split in chunks, with fixed noise, and returns a tensor
    `(N, ...)` or a named tuple of such tensors. A title shows a progress bar on a terminal.

    Raises:
        ValueError: the split is empty.

    >>> split = Split(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), None)
    >>> over(split, lambda x, y: x.sum((1, 2, 3)), batch_size=2, seed=0).shape
    torch.Size([5])
    """
    count, done = len(split.images), 0
    if not count:
        raise ValueError("split must hold an image or more, not none")
    total = math.ceil(count / batch_size)
    with fixed_noise(split.images.device, seed):
        # disable=None: no bar where the output is not a terminal
        bar = tqdm(
            chunks(split, batch_size),
            title,
            total=total,
            leave=False,
            disable=None if title else True,
        )
        for x, y in bar:
            found = function(x, y)
            parts = (found,) if isinstance(found, Tensor) else found
            if not done:  # full size now: small tensors among freed large ones would split memory
                results = [part.new_empty(count, *part.shape[1:]) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result[done : done + len(x)] = part
            done += len(x)
    return results[0] if isinstance(found, Tensor) else type(found)(*results)
