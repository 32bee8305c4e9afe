r"""Digits as a latent class: ten classes without names, summed out exactly.

The first pair is a mixture: a VAE whose only latent is a class y. Its likelihood is one template
image for each class, its evidence is a sum, and its guide is empty, as no latent is left to infer:

    log p(x) = log sum_y p(y) p(x | y).

The second pair has a style z too, drawn by a guide q(z | x), while y is still summed out:

    log p(x) >= E_q(z|x)[ log sum_y p(y) p(x | z, y) ] - KL(q(z|x) || p(z)).

Under `TraceEnum_ELBO` Pyro sums out each site with `infer={"enumerate": "parallel"}`. Given z the
posterior p(y | x, z) is exact, so there is no q(y | x) that must be trained or could collapse. The
labels of the images only name the classes afterwards; no model sees them. The pairs are composed by
hand and are not saved.

Source: Semi-supervised Learning with Deep Generative Models (2014), arXiv:1406.5298, without its
labels; enumeration: Tensor Variable Elimination for Plated Factor Graphs (2019), arXiv:1902.03210.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, infer_discrete
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pvae
from pvae import Conditional, Guide, cli, data, evaluate, plots, tables
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.programs import Program
from pvae.study import Study, start

# one plate, so Pyro enumerates along dimension -2, left of the batch
ELBO = TraceEnum_ELBO(max_plate_nesting=1)


class Mixture(Program):
    """p(y) p(x | y), the classes equally likely a priori; `likelihood(y)` is over `x`."""

    def __init__(self, classes: int, likelihood: Conditional) -> None:
        super().__init__()
        self.classes = classes
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> None:
        self.register()
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", equally_likely(self.classes, x), infer={"enumerate": "parallel"})
            pyro.sample("x", self.likelihood(y), obs=x)


class StyledMixture(Program):
    """p(y) p(z) p(x | z, y), with a style z too; `likelihood(z, y)` is over `x`."""

    def __init__(self, classes: int, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> None:
        self.register()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            y = pyro.sample("y", equally_likely(self.classes, x), infer={"enumerate": "parallel"})
            pyro.sample("x", self.likelihood(z, y), obs=x)


def equally_likely(classes: int, like: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=like.new_zeros(classes))


def nothing(x: Tensor) -> None:
    """The empty guide: every latent of the model is summed out."""


def most_probable(model: Program, guide: Callable[..., Any], x: Tensor) -> Tensor:
    """The class of each image `(B,)`: argmax_y p(y | x, z) at a draw of z ~ q(z|x), by Pyro."""
    with evaluate.evaluating(model, guide):
        guide_trace = poutine.trace(guide).get_trace(x)
        replayed = poutine.replay(model, trace=guide_trace)
        decided = infer_discrete(replayed, first_available_dim=-2, temperature=0)
        trace: Any = poutine.trace(decided).get_trace(x)
        return trace.nodes["y"]["value"]


class StyledTemplates(nn.Module):
    """From style and one-hot class `(N, D + K)` to logits: a template plus a network's change.

    The change starts at 0, so that each class starts with the meaning that it has in the mixture.
    """

    def __init__(self, templates: Tensor, style_dim: int) -> None:
        super().__init__()
        self.templates = nn.Parameter(templates.clone())  # (K, C, H, W)
        self.change = MLP((style_dim + len(templates),), templates.shape[1:], (256,))
        for parameter in self.change.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, v: Tensor) -> Tensor:
        y = v[:, -len(self.templates) :]
        return torch.tensordot(y, self.templates, 1) + self.change(v)


def mixture(classes: int, mean_logits: Tensor) -> Mixture:
    """Templates at the mean image `(C, H, W)` plus noise: equal templates would stay equal."""
    shape = mean_logits.shape
    templates = nn.Embedding(classes, mean_logits.numel())
    with torch.no_grad():
        templates.weight.mul_(0.3).add_(mean_logits.flatten())
    net = nn.Sequential(templates, nn.Unflatten(1, shape))
    return Mixture(classes, Conditional(net, Bernoulli(shape), event_dim=0))


def styled(templates: Tensor, style_dim: int) -> tuple[StyledMixture, Guide]:
    """The pair with a style, from the templates `(K, C, H, W)` of a mixture."""
    classes, shape = len(templates), templates.shape[1:]

    def beside(z: Tensor, y: Tensor) -> Tensor:  # z (*, B, D); y (K, 1) while Pyro sums it out
        batch = torch.broadcast_shapes(z.shape[:-1], y.shape)
        return torch.cat([z.expand(*batch, -1), one_hot(y, classes).to(z).expand(*batch, -1)], -1)

    net = StyledTemplates(templates, style_dim)
    likelihood = Conditional(net, Bernoulli(shape), event_dim=1, join=beside)
    head = Normal((style_dim,))
    encoder = MLP(shape, head.param_shape, (256,))
    posterior = Conditional(encoder, head, event_dim=3)
    return StyledMixture(classes, StandardNormal(style_dim), likelihood), Guide(posterior)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    study = start(args, "latent_class", "dynamic")
    test = study.data.test
    if test.labels is None:
        raise ValueError(f"{study.dataset.name} has no labels, which are to name the classes")
    x = data.pixels(test.images)

    # a quarter of the steps trains the mixture; the styled model starts from its templates
    mean = study.dataset.mean_image
    plain = mixture(args.classes, Bernoulli(mean.shape).raw_mean(mean)).to(study.device)
    steps = args.num_epochs * math.ceil(len(study.data.train.images) / args.batch_size)
    batches = endless(study.data, args)
    fit(plain, nothing, batches, steps=math.ceil(steps / 4), rate=0.05, quiet=args.quiet)
    with torch.no_grad():
        templates = plain.likelihood.raw(torch.arange(args.classes, device=study.device))
    model, guide = styled(templates, args.style_dim)
    nn.ModuleList([model, guide]).to(study.device)
    rate = args.learning_rate
    fit(model, guide, batches, steps=math.ceil(3 * steps / 4), rate=rate, quiet=args.quiet)

    numbers: dict[str, Any] = {}
    pairs: list[tuple[str, str, Program, Callable[..., Any]]] = [
        ("mixture", "log p(x), exact", plain, nothing),
        ("styled", "ELBO", model, guide),
    ]
    for name, what, p, q in pairs:
        with evaluate.fixed_noise(study.device, args.seed):
            bound = -math.fsum(elbo_loss(p, q, part) for part in x.split(500)) / len(x)
            y = torch.cat([most_probable(p, q, part) for part in x.split(500)])
        classes = named(y, test.labels, args.classes, study.dataset.class_names)
        purity = sum(c.share * c.purity for c in classes)
        found = [c._asdict() for c in classes]
        numbers[name] = {what: bound, "purity": purity, "classes": found}
        print(table(f"{name}: {what} {bound:.2f} nats per image", purity, classes, study))
    figures = {"classes": drawn(model, x, y, classes), "styles": styles(model, args.style_dim)}
    study.save({**numbers, "seconds": study.seconds}, **figures)
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def table(what: str, purity: float, classes: Sequence["Named"], study: Study) -> str:
    rows = [
        [str(k), f"{c.share:.1%}", c.label or "none", f"{c.purity:.1%}"]
        for k, c in enumerate(classes)
    ]
    return tables.columns(
        f"{what}, purity {purity:.1%}\n  {study.dataset.name} test set, "
        f"{len(study.data.test.images):,} images, {study.data.label}",
        ["class", "share", "majority label", "purity"],
        rows,
    )


def endless(observed: data.Observed, args: argparse.Namespace) -> Iterator[Tensor]:
    """Batches `(B, C, H, W)`, epoch after epoch, without their labels."""
    for epoch in count():
        for x, _ in observed.batches(args.batch_size, seed=args.seed, epoch=epoch):
            yield x


def fit(
    model: Program,
    guide: Callable[..., Any],
    batches: Iterator[Tensor],
    *,
    steps: int,
    rate: float,
    quiet: bool,
) -> None:
    """Trains by stock SVI; Pyro computes the sum over classes."""
    programs = nn.ModuleList([p for p in (model, guide) if isinstance(p, nn.Module)])
    adam = torch.optim.Adam(programs.parameters(), lr=rate)
    schedule = CosineAnnealingLR(adam, steps)
    svi = SVI(model, guide, pvae.SingleOptimizer(adam), ELBO)
    title = type(model).__name__
    for x in tqdm(islice(batches, steps), title, steps, leave=False, disable=quiet or None):
        svi.step(x)
        schedule.step()


def elbo_loss(model: Program, guide: Callable[..., Any], x: Tensor) -> float:
    """The negative ELBO, summed over images `(B, C, H, W)`, in nats."""
    with evaluate.evaluating(model, guide):
        return ELBO.loss(model, guide, x)


class Named(NamedTuple):
    """A class: its share of all images, its majority label, and this label's share in the class."""

    share: float
    label: str | None
    purity: float


def named(
    y: Tensor, labels: Tensor, classes: int, names: Sequence[str] | None = None
) -> list[Named]:
    """Finds each class's majority label from the classes and the labels of all images `(N,)`;
    `names` are the names of the labels, if they are not digits."""
    found = []
    for k in range(classes):
        members = labels[y == k]
        if len(members) == 0:
            found.append(Named(0.0, None, 0.0))
            continue
        times, label = members.bincount().max(0)
        name = str(label.item()) if names is None else names[int(label)]
        found.append(Named(len(members) / len(y), name, times.item() / len(members)))
    return found


def drawn(model: StyledMixture, x: Tensor, y: Tensor, classes: list[Named]) -> Figure:
    """A row for each class: its mean image at style 0, then test images of this class."""
    with torch.no_grad():
        prior = model.prior()
        every = torch.arange(len(classes), device=x.device)
        means = model.likelihood(prior.mean.expand(len(classes), -1), every).mean
    rows = []
    for k, mean in enumerate(means):
        members = x[y == k][:12]
        blank = x.new_ones(12 - len(members), *x.shape[1:])
        rows.append(torch.cat([mean[None], members, blank]))
    return plots.grid(
        torch.cat(rows),
        13,
        title="The classes found: decoded at style 0, and the first test images of each",
        row_labels=[f"{c.label or 'none'}: {c.purity:.0%}" for c in classes],
        column_labels=["z = 0"] + [""] * 12,
    )


@torch.no_grad()
def styles(model: StyledMixture, style_dim: int) -> Figure:
    """Every class in the same styles: z from -2 to 2 along its first two units, one at a time."""
    moved = [(unit, t) for unit in range(min(style_dim, 2)) for t in (-2, -1.2, -0.4, 0.4, 1.2, 2)]
    mean = model.prior().mean
    z = mean.repeat(len(moved), 1)  # (S, D)
    for row, (unit, t) in enumerate(moved):
        z[row, unit] = t
    y = torch.arange(model.classes, device=mean.device)[:, None]  # (K, 1)
    images = model.likelihood(z, y).mean  # (K, S, C, H, W)
    return plots.grid(
        images.flatten(0, 1),
        len(moved),
        title="Classes (rows) in the same styles (columns)",
        column_labels=[f"z{unit + 1} = {t:g}" for unit, t in moved],
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("Digits as a latent class, summed out exactly.")
    cli.option(parser, "--classes", "how many", cli.NATURAL, 10, "K")
    cli.option(parser, "--style-dim", "of z", cli.NATURAL, 2, "D")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main)
