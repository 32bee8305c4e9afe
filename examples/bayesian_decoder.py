r"""A decoder with Bayesian weights: its parameters are latents too.

The weights w of the decoder are one more latent, drawn once for the whole data set; the latents z_n
are drawn for each of its N images:

    p(w) prod_n p(z_n) p(x_n | z_n, w),      q(w) prod_n q(z_n | x_n).

    ELBO = E_q[ sum_n log p(x_n | z_n, w) - KL(q(z_n|x_n) || p(z_n)) ] - KL(q(w) || p(w))

A batch of B images stands for all N images: the data plate has size N and takes the batch as its
subsample. Pyro then scales the terms inside the plate by N / B. The KL of w is outside the plate
and is counted once for the data set, not once for each batch. With more data this KL grows, but
more slowly than N: the posterior of the weights narrows, and the decoded images vary less.

Beside each Bayesian pair the program trains a decoder with point weights, in the same way on the
same images. This one has a run folder inside the study's folder, which `pvae.load` and
`python -m pvae.evaluate` take. The Bayesian pair is composed by hand and has no recipe.

Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114, appendix F.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pvae
from pvae import cli, data, evaluate, plots, tables
from pvae.programs import Program
from pvae.study import Study, start
from pvae.vae import VAE


class BayesianModel(nn.Module):
    """p(w) prod_n p(z_n) p(x_n | z_n, w): the parameters w of `likelihood(z)` are drawn.

    Each parameter has a normal prior with mean 0 and scale 1 / sqrt(fan-in): the output of every
    layer is then about as large as its input. Nothing here is learned: the parameters of
    `likelihood` only give w their names and shapes.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, images: int) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.images = images  # N

    def weight_priors(self) -> dict[str, Any]:
        shaped = self.likelihood.named_parameters()
        scales = {name: torch.full_like(w, w[0].numel() ** -0.5) for name, w in shaped}
        return {name: dist.Normal(0 * s, s).to_event(s.dim()) for name, s in scales.items()}

    def forward(self, x: Tensor) -> None:
        w = {name: pyro.sample(f"w.{name}", p) for name, p in self.weight_priors().items()}
        with pyro.plate("data", self.images, subsample=x):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", functional_call(self.likelihood, w, (z,)), obs=x)


class BayesianGuide(Program):
    """q(w) prod_n q(z_n | x_n): for each weight a normal, at first narrow about `likelihood`'s."""

    def __init__(self, posterior: nn.Module, likelihood: nn.Module, images: int) -> None:
        super().__init__()
        self.posterior = posterior
        self.loc = copy.deepcopy(likelihood)
        self.log_scale = copy.deepcopy(likelihood)
        for p in self.log_scale.parameters():
            nn.init.constant_(p, math.log(0.01))
        self.images = images

    def weight_posteriors(self) -> dict[str, Any]:
        log_scales = dict(self.log_scale.named_parameters())
        return {
            name: dist.Normal(loc, log_scales[name].exp()).to_event(loc.dim())
            for name, loc in self.loc.named_parameters()
        }

    def forward(self, x: Tensor) -> None:
        self.register()
        for name, q in self.weight_posteriors().items():
            pyro.sample(f"w.{name}", q)
        with pyro.plate("data", self.images, subsample=x):
            pyro.sample("z", self.posterior(x))


def weight_kl(model: BayesianModel, guide: BayesianGuide) -> Tensor:
    """KL(q(w) || p(w)) of all weights together, in nats."""
    priors = model.weight_priors()
    kls = [
        torch.distributions.kl_divergence(q, priors[name])
        for name, q in guide.weight_posteriors().items()
    ]
    return torch.stack(kls).sum()


def draw_weights(vae: VAE, guide: BayesianGuide) -> None:
    """Fills the decoder of a plain VAE with one draw w ~ q(w)."""
    draw = {name: q.sample() for name, q in guide.weight_posteriors().items()}
    vae.model.likelihood.load_state_dict(draw)


class Decoders(NamedTuple):
    """Results for one size of the training set: images decoded over weight draws, and numbers."""

    mean: Tensor  # (B, C, H, W)
    std: Tensor
    numbers: dict[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("A decoder with Bayesian weights, for more and more training images.")
    parser.add_argument(
        "--train-images",
        type=cli.NATURAL,
        nargs="+",
        default=[500, 5_000, 50_000],
        metavar="N",
        help="sizes of the training set",
    )
    cli.option(parser, "--latent-dim", "dimension of z", cli.NATURAL, 8, "D")
    args = parser.parse_args(argv)
    study = start(args, "bayesian_decoder", "dynamic")
    there = len(study.dataset.train.images)
    sizes = sorted({min(size, there) for size in args.train_images})
    # every size gets the same number of steps: those of all epochs, divided by the number of sizes
    steps = math.ceil(args.num_epochs * there / args.batch_size / len(sizes))
    x = data.pixels(study.data.test.first(1000).images)

    decoders = {}
    with tqdm(total=2 * steps * len(sizes), leave=False, disable=args.quiet or None) as bar:
        for size in sizes:
            bar.set_description(f"{size:,} images")
            decoders[size] = at_size(study, size, x, steps, bar)

    numbers = {size: d.numbers for size, d in decoders.items()}
    study.save({str(n): row for n, row in numbers.items()}, uncertainty=drawn(x[:12], decoders))
    print(
        tables.columns(
            f"{study.dataset.name}, {len(x):,} test images, {study.data.label}, nats",
            ["training images", *next(iter(numbers.values()))],
            [[f"{n:,}", *(f"{v:.4g}" for v in row.values())] for n, row in numbers.items()],
        )
    )
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


def at_size(study: Study, n: int, x: Tensor, steps: int, bar: Any) -> Decoders:
    """Trains both decoders on the first `n` images, and evaluates them on the test images `x`."""
    args, kept = study.args, study.data.train.first(n)
    train = partial(fit, replace(study.data, train=kept), args, steps, bar)
    mean_image = replace(study.dataset, train=kept).mean_image
    point, vae = (
        pvae.build(x.shape[1:], args.latent_dim, "mlp", mean_image=mean_image).to(study.device)
        for _ in range(2)
    )
    train(point.model, point.guide, list(point.parameters()))
    pvae.save(point, study.part(f"point_{n}").folder / "best.pt")
    with evaluate.fixed_noise(x.device, args.seed):
        point_elbo = evaluate.elbo(point.model, point.guide, x).elbo

    model = BayesianModel(vae.model.prior, vae.model.likelihood, n)
    guide = BayesianGuide(vae.guide.posterior, vae.model.likelihood, n).to(x.device)
    train(model, guide, list(guide.parameters()))
    elbos, images = [], []
    with torch.no_grad(), evaluate.fixed_noise(x.device, args.seed):
        for _ in range(30):
            draw_weights(vae, guide)
            elbos.append(evaluate.elbo(vae.model, vae.guide, x).elbo)
            images.append(vae.reconstruct(x[:12]))
        kl = weight_kl(model, guide).item()
    std = torch.stack(images).std(0)
    return Decoders(
        torch.stack(images).mean(0),
        std,
        {
            "KL(q(w)||p(w))": kl,
            "per training image": kl / n,
            "pixel std": std.mean().item(),
            "test ELBO given w ~ q(w)": torch.stack(elbos).mean().item(),
            "test ELBO, point weights": point_elbo.mean().item(),
        },
    )


def fit(
    observed: data.Observed,
    args: Any,
    steps: int,
    bar: Any,
    model: nn.Module,
    guide: nn.Module,
    learned: list[nn.Parameter],
) -> None:
    """Stock SVI over `steps` batches; the KLs of z and of w are analytic."""
    adam = torch.optim.Adam(learned, lr=args.learning_rate)
    schedule = CosineAnnealingLR(adam, steps)
    svi = SVI(model, guide, pvae.SingleOptimizer(adam), TraceMeanField_ELBO())
    epochs = (observed.batches(args.batch_size, seed=args.seed, epoch=e) for e in count())
    for x, _ in islice(chain.from_iterable(epochs), steps):
        svi.step(x)
        schedule.step()
        bar.update()


def drawn(x: Tensor, decoders: Mapping[int, Decoders]) -> Figure:
    """Test images, and for each training size the mean and std of their decoded images."""
    top = max(d.std.max() for d in decoders.values())  # one scale for all sizes, to compare them
    rows = [x, *(image for d in decoders.values() for image in (d.mean, d.std / top))]
    labels = ["x", *(f"N = {n:,}: {what}" for n in decoders for what in ("mean", "std"))]
    return plots.grid(
        torch.cat(rows),
        len(x),
        title=f"Decoded over weights w ~ q(w), trained on N images (std: white is {top:.2f})",
        row_labels=labels,
    )


if __name__ == "__main__":
    cli.run_main(main)
