r"""Semi-supervised learning: a few images have labels, the others have none (the model M2).

    p(y) p(z) p(x | z, y),    q(y | x) q(z | x, y),

where the class y is one of K, and the style z is in R^D. For an image with a label, y is data, and
SVI with Trace_ELBO maximizes the bound on log p(x, y). The classifier q(y|x) would learn nothing
from these images, so a classification term of weight alpha is added:

    L(x, y) = E_q(z|x,y)[ log p(x|z,y) + log p(y) + log p(z) - log q(z|x,y) ]  +  alpha log q(y|x).

For an image without a label, y is a latent, and TraceEnum_ELBO sums it out exactly, without alpha:

    U(x) = sum_y q(y|x) ( L_alpha=0(x, y) - log q(y|x) )  <=  log p(x).

Each step takes one batch of each kind. So q(y|x) is a classifier that has seen all images. It is
compared with the same network trained on the labelled images alone; q(y|x) also starts from the
weights of this network. A z of two dimensions cannot describe x without the class; a z of many
dimensions can, and then y means little. The second figure shows the style of one image under every
class.

The pair is composed by hand and is not saved.

Source: Semi-Supervised Learning with Deep Generative Models (2014), arXiv:1406.5298.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pvae
from pvae import ConcatLabel, Conditional, cli, data, evaluate, plots, tables
from pvae.heads import Bernoulli, Normal
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.programs import LabelGuide, LabelModel
from pvae.study import Study, start

# one plate, so Pyro enumerates the labels along dimension -2, left of the batch
UNLABELLED = TraceEnum_ELBO(max_plate_nesting=1)
LABELLED = Trace_ELBO()


class Categorical(nn.Module):
    """The head of a classifier: `K` logits to a distribution over labels."""

    def forward(self, h: Tensor) -> dist.Distribution:
        return dist.Categorical(logits=h)


def m2(
    mean_image: Tensor, classes: int, latent_dim: int, hidden: int
) -> tuple[LabelModel, LabelGuide]:
    """The pair M2; each of its three networks has one hidden layer."""
    shape = mean_image.shape
    pixels, z_head = Bernoulli(shape), Normal((latent_dim,))
    beside_x, beside_z = ConcatLabel(classes, event_dim=3, flatten=True), ConcatLabel(classes)
    decoder = MLP(beside_z.joined_shape((latent_dim,)), pixels.param_shape, (hidden,))
    decoder.set_output_bias(pixels.raw_mean(mean_image))
    encoder = MLP(beside_x.joined_shape(shape), z_head.param_shape, (hidden,))
    return (
        LabelModel(
            StandardNormal(latent_dim),
            Conditional(decoder, pixels, event_dim=1, join=beside_z),
            classes,
        ),
        LabelGuide(
            Conditional(MLP(shape, (classes,), (hidden,)), Categorical(), event_dim=3),
            Conditional(encoder, z_head, event_dim=1, join=beside_x),
        ),
    )


class Labelled:
    """The program of labelled images: `model`, and `alpha log q(y|x)` of the guide's classifier."""

    def __init__(self, model: LabelModel, guide: LabelGuide, alpha: float) -> None:
        self.model, self.guide, self.alpha = model, guide, alpha

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.model(x, y)
        with pyro.plate("labels", len(x)), poutine.scale(scale=self.alpha):
            pyro.sample("label", self.guide.classifier(x), obs=y)


def endless(observed: data.Observed, args: argparse.Namespace) -> Iterator[Any]:
    """Batches `(x, y)`, epoch after epoch."""
    for epoch in count():
        yield from observed.batches(args.batch_size, seed=args.seed, epoch=epoch)


def per_class(images: Tensor, labels: Tensor, total: int, classes: int) -> data.Split:
    """The first images of each class, the same number of each, `total` together."""
    index = torch.cat([torch.where(labels == k)[0][: total // classes] for k in range(classes)])
    return data.Split(images[index], labels[index])


def fit_m2(
    model: LabelModel,
    guide: LabelGuide,
    batches: Iterator[Any],
    *,
    steps: int,
    rate: float,
    alpha: float,
    title: str,
    quiet: bool,
) -> None:
    """Trains by two stock SVIs; `batches` hold unlabelled and labelled images, `(x, (x, y))`."""
    adam = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=rate)
    schedule = CosineAnnealingLR(adam, steps)
    optimizer = pvae.SingleOptimizer(adam)
    unlabelled = SVI(model, guide, optimizer, UNLABELLED)
    labelled = SVI(Labelled(model, guide, alpha), guide, optimizer, LABELLED)
    for u, (x, y) in tqdm(islice(batches, steps), title, steps, leave=False, disable=quiet or None):
        unlabelled.step(u)
        labelled.step(x, y)
        schedule.step()


def fit_classifier(
    classifier: nn.Module, batches: Iterator[Any], *, steps: int, rate: float
) -> None:
    """Trains a classifier on the labelled images `(x, y)` alone."""
    adam = torch.optim.Adam(classifier.parameters(), lr=rate)
    schedule = CosineAnnealingLR(adam, steps)
    for x, y in islice(batches, steps):
        adam.zero_grad()
        cross_entropy(classifier(x).logits, y).backward()
        adam.step()
        schedule.step()


@torch.no_grad()
def accuracy(classifier: Any, test: data.Split) -> evaluate.Estimate:
    """The share of test images whose most probable class is their label."""
    right = [classifier(x).logits.argmax(-1) == y for x, y in data.chunks(test, 500)]
    return evaluate.estimate(torch.cat(right).float())


def bound(model: LabelModel, guide: LabelGuide, test: data.Split, seed: int) -> float:
    """The bound U(x) on log p(x), nats per image."""
    x = data.pixels(test.images)
    with evaluate.evaluating(model, guide), evaluate.fixed_noise(x.device, seed):
        return -math.fsum(UNLABELLED.loss(model, guide, part) for part in x.split(200)) / len(x)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.alpha < 0:
        raise ValueError(f"--alpha must be at least 0, not {args.alpha:g}")
    study = start(args, "semi_supervised", "dynamic")
    classes, train, test = study.dataset.num_classes, study.data.train, study.data.test
    if classes is None or train.labels is None:
        raise ValueError(f"{study.dataset.name} has no labels, a few of which are needed")
    amounts = how_many(args.labels, int(train.labels.bincount().min()) * classes, classes)
    pool = data.Split(train.images[: args.unlabelled], None)
    steps = args.num_epochs * math.ceil(len(pool.images) / args.batch_size)

    rows = []
    for labels in amounts:
        few = replace(study.data, train=per_class(train.images, train.labels, labels, classes))
        unlabelled = (x for x, _ in endless(replace(study.data, train=pool), args))
        pyro.set_rng_seed(args.seed)
        model, guide = m2(study.dataset.mean_image, classes, args.latent_dim, args.hidden)
        alone = m2(study.dataset.mean_image, classes, args.latent_dim, args.hidden)[1].classifier
        nn.ModuleList([model, guide, alone]).to(study.device)
        fit_classifier(alone, endless(few, args), steps=steps, rate=args.learning_rate)
        guide.classifier.load_state_dict(alone.state_dict())  # start from the labels alone
        fit_m2(
            *(model, guide, zip(unlabelled, endless(few, args), strict=True)),
            steps=steps,
            rate=args.learning_rate,
            alpha=args.alpha,
            title=f"{labels} labels",
            quiet=args.quiet,
        )
        rows.append(
            {
                "labels": labels,
                "labels_alone": accuracy(alone, test)._asdict(),
                "m2": accuracy(guide.classifier, test)._asdict(),
                "bound": bound(model, guide, test, args.seed),
            }
        )
    figures = {
        "accuracy": drawn(rows, study.dataset.name),
        "styles": styles(model, guide, study, amounts[-1]),
    }
    study.save({"rows": rows, "seconds": study.seconds}, **figures)
    print(table(rows, len(pool.images), study))
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def how_many(asked: list[int] | None, most: int, classes: int) -> list[int]:
    """The numbers of labels: those that the user gave, or the default ones that the data allow."""
    amounts = asked or [n for n in (100, 300, 1000, 3000) if n <= most] or [most]
    for labels in amounts:
        if not classes <= labels <= most:
            raise ValueError(f"--labels must be from {classes} to {most:,}, not {labels:,}")
    return amounts


def table(rows: list[dict[str, Any]], unlabelled: int, study: Study) -> str:
    def share(of: dict[str, float]) -> str:
        return f"{100 * of['mean']:.1f} ± {100 * of['se']:.1f} %"

    return tables.columns(
        f"{study.dataset.name} test set, {len(study.data.test.images):,} images, "
        f"{study.data.label}; {unlabelled:,} images without labels",
        ["labels", "accuracy, labels alone", "accuracy, M2", "M2: bound on log p(x), nats"],
        [
            [f"{r['labels']:,}", share(r["labels_alone"]), share(r["m2"]), f"{r['bound']:.2f}"]
            for r in rows
        ],
    )


def drawn(rows: list[dict[str, Any]], name: str) -> Figure:
    """Accuracy against the number of labels."""
    figure = Figure((6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    x = [r["labels"] for r in rows]
    for key, colour, label in (
        ("m2", "#3f90da", "M2: labels, and the other images"),
        ("labels_alone", "#bd1f01", "the same classifier, labels alone"),
    ):
        mean = [100 * r[key]["mean"] for r in rows]
        axes.errorbar(
            x, mean, [100 * r[key]["se"] for r in rows], fmt="o-", color=colour, label=label
        )
        for at, value in zip(x, mean, strict=True):
            below = key == "labels_alone"
            axes.annotate(
                f"{value:.1f}",
                (at, value),
                xytext=(0, -14 if below else 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{n:,}" for n in x])
    axes.minorticks_off()
    axes.margins(0.08, 0.15)
    axes.set(xlabel="labelled images", ylabel="accuracy on test images, %")
    axes.set_title(f"{name}: accuracy by the number of labels (bars: one standard error)")
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def styles(model: Any, guide: Any, study: Study, labels: int) -> Figure:
    """A row for each of ten test images: the image, then its style z under every class."""
    x = data.pixels(study.data.test.first(10).images)
    y = guide.classifier(x).logits.argmax(-1)
    z = guide.posterior(x, y).mean  # (N, D)
    every = torch.arange(model.num_classes, device=x.device)
    means = model.likelihood(z[:, None], every).mean  # (N, K, C, H, W)
    images = torch.cat([x[:, None], means], 1)
    names = study.dataset.class_names or [str(k) for k in every.tolist()]
    return plots.grid(
        images.flatten(0, 1),
        images.shape[1],
        title=f"The style of a test image under every class; {labels:,} labels",
        column_labels=["x", *names],
        row_labels=[f"taken for {names[k]}" for k in y.tolist()],
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("Semi-supervised learning, the model M2.")
    group = parser.add_argument_group("semi-supervised")
    group.add_argument(
        "--labels",
        type=cli.NATURAL,
        nargs="+",
        metavar="L",
        help="how many images have labels, one training each (default: those of 100, 300, 1000 "
        "and 3000 that there are)",
    )
    cli.option(group, "--unlabelled", "images without labels", cli.NATURAL, 10_000, "N")
    cli.option(group, "--alpha", "weight of the classification term, nats", float, 50.0, "A")
    cli.option(group, "--latent-dim", "of z", cli.NATURAL, 2, "D")
    cli.option(group, "--hidden", "width", cli.NATURAL, 256, "N")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main)
