r"""An autoencoder beside the VAE of the same networks: what sampling its latent space gives.

The VAE's encoder is one network whose output is split into loc and log-variance,

    z = loc(x) + exp(log_variance(x) / 2) noise,   loss = E[-log p(x|z)] + KL(q(z|x) || N(0, I)).

The autoencoder is the VAE's limit without noise and without KL, in plain torch:

    z = loc(x),                                    loss = -log p(x|z),

where -log p(x|z) is the cross-entropy (Bernoulli) or half the squared error (normal of scale 1, up
to a constant). The autoencoder reconstructs better, as no KL pulls its codes towards N(0, I). For
the same reason draws from N(0, I) miss its codes and decode to poor images. A normal fitted to the
codes afterwards has their mean and covariance, but not their shape. The VAE draws from its prior.

Both models have a run folder, which `pvae.load` takes. The log-variance of the autoencoder is not
trained: the autoencoder has codes and images, but no posterior, and so no ELBO.

Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

import pvae
from pvae import cli, data, evaluate, plots, results, tables
from pvae.builder import LIKELIHOODS
from pvae.results import Subject
from pvae.study import DEFAULT, Study, finish, fit, start
from pvae.vae import VAE


def cross_entropy(h: Tensor, x: Tensor) -> Tensor:
    """`-log p(x|z)` of Bernoulli pixels with logits `h`, summed over images."""
    return F.binary_cross_entropy_with_logits(h, x, reduction="sum")


def half_squared_error(h: Tensor, x: Tensor) -> Tensor:
    """`-log p(x|z)` of normal pixels, loc `h`, scale 1, without `log(2 pi) / 2` for each pixel."""
    return F.mse_loss(h, x, reduction="sum") / 2


LOSSES = {"bernoulli": cross_entropy, "gaussian": half_squared_error}


def autoencoder_loss(x: Tensor, encoder: nn.Module, decoder: nn.Module, likelihood: str) -> Tensor:
    """`-log p(x | z = loc(x))` summed over images `(B, C, H, W)`: no noise and no KL."""
    loc, _ = encoder(x).chunk(2, dim=-1)  # the log-variance is not used
    return LOSSES[likelihood](decoder(loc), x)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    study = start(args, "autoencoder", data.usual_observation(LIKELIHOODS[args.likelihood].data))
    pairs = {"autoencoder": build(study), "VAE": build(study)}
    train_autoencoder(pairs["autoencoder"], study.part("autoencoder"))
    bound = train_vae(pairs["VAE"], study.part("vae"))

    subjects = {name: Subject(p, study.data, args.seed, quiet=True) for name, p in pairs.items()}
    numbers: dict[str, Any] = {name: at_codes(subject) for name, subject in subjects.items()}
    numbers["VAE"] |= bound
    with evaluate.evaluating(*pairs.values()), evaluate.fixed_noise(study.device, args.seed):
        figures = {
            "reconstructions": reconstructions(pairs, numbers, study),
            "samples": samples(subjects),
        }
        if args.latent_dim == 2:
            figures |= {f"codes_{name}": plane(name, s, study) for name, s in subjects.items()}
    study.save({**numbers, "seconds": study.seconds}, **figures)
    print(table(numbers, study))
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def build(study: Study) -> VAE:
    """A pair; autoencoder and VAE have the same networks and the same initial weights."""
    args = study.args
    pyro.set_rng_seed(args.seed)
    return pvae.build(
        study.dataset.image_shape,
        args.latent_dim,
        "mlp",
        args.likelihood,
        hidden=400,
        mean_image=study.data.mean_image,
    ).to(study.device)


def train_autoencoder(pair: VAE, study: Study) -> None:
    """Trains the pair's two networks in plain torch, without Pyro and without a distribution."""
    args, images = study.args, len(study.data.train.images)
    encoder = pair.guide.posterior.get_submodule("net")
    decoder = pair.model.likelihood.get_submodule("net")
    total = args.num_epochs * math.ceil(images / args.batch_size)
    adam = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()], lr=args.learning_rate, fused=True
    )
    schedule = LambdaLR(adam, lambda step: DEFAULT.learning_rate_factor(step, total))
    epochs = trange(args.num_epochs, desc="autoencoder", disable=True if args.quiet else None)
    for epoch in epochs:
        summed = 0.0
        for x, _ in study.data.batches(args.batch_size, seed=args.seed, epoch=epoch):
            loss = autoencoder_loss(x, encoder, decoder, args.likelihood)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            summed += loss.item()
        epochs.set_postfix(loss=summed / images)
    pvae.save(pair, study.folder / "best.pt")


def train_vae(vae: VAE, study: Study) -> dict[str, float]:
    """Trains by SVI, the KL analytic, with the same schedule; returns the test ELBO and terms."""
    adam = torch.optim.Adam(vae.parameters(), lr=study.args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), TraceMeanField_ELBO())
    rows = finish(study, fit(study, vae, svi), quiet=True)
    return {r.key: r.value.mean for r in rows if r.key in ("elbo", "distortion", "rate")}


# ---- numbers of each model ----


class AtCode(NamedTuple):
    """Results for each image at `z = loc(x)`: the code `(B, D)`; -log p(x|z) in nats and the
    squared error of the mean image, both summed over pixels, `(B,)`."""

    code: Tensor
    distortion: Tensor
    squared_error: Tensor


def at_codes(subject: Subject) -> dict[str, float]:
    """Means over the test images, and the number of active units of the code."""
    pair = subject.vae

    def at_code(x: Tensor, y: Tensor | None) -> AtCode:
        z = pair.encode(x).mean
        p = pair.decode(z)
        return AtCode(z, -p.log_prob(x), (p.mean - x).square().sum(dim=(1, 2, 3)))

    with evaluate.evaluating(pair):
        at = subject.over(subject.data.test, at_code, batch_size=500)
    return {
        "distortion_at_code": at.distortion.mean().item(),
        "squared_error": at.squared_error.mean().item(),
        "active_units": evaluate.active_units(at.code),
    }


def table(numbers: Mapping[str, Mapping[str, float]], study: Study) -> str:
    columns = {
        "distortion_at_code": "-log p(x|z = loc)",
        "distortion": "distortion, -E_q log p(x|z)",
        "rate": "rate (KL)",
        "elbo": "ELBO",
        "squared_error": "squared error",
    }
    rows = []
    for name, of in numbers.items():
        cells = [f"{of[key]:.2f}" if key in of else "none" for key in columns]
        rows.append([name, *cells, f"{of['active_units']} of {study.args.latent_dim}"])
    return tables.columns(
        f"{study.dataset.name} test set, {study.data.label}, {study.args.likelihood} pixels; per "
        "image, in nats but for the squared error\n"
        "  (-log p(x|z = loc) is a reconstruction term only: it bounds nothing)",
        ["", *columns.values(), "active units"],
        rows,
    )


# ---- pictures ----


def reconstructions(
    pairs: Mapping[str, VAE], numbers: Mapping[str, Mapping[str, float]], study: Study
) -> Figure:
    x = data.pixels(study.data.test.first(16).images)
    rows = [x, *(pair.reconstruct(x).clamp(0, 1) for pair in pairs.values())]
    nats = ", ".join(f"{name} {numbers[name]['distortion_at_code']:.1f}" for name in pairs)
    return plots.grid(
        torch.cat(rows),
        len(x),
        title=f"Test images and reconstructions; -log p(x|z = loc), nats an image: {nats}",
        row_labels=["x", *pairs],
    )


def samples(subjects: Mapping[str, Subject], count: int = 32) -> Figure:
    """Mean images of both models at draws of N(0, I), and the autoencoder's at a fitted normal."""
    autoencoder, vae = (subject.vae for subject in subjects.values())
    training = results.codes(subjects["autoencoder"], subjects["autoencoder"].data.train)
    dim = training.shape[1]
    # a small number added to the variances: a constant code would make the covariance singular
    covariance = training.T.cov().reshape(dim, dim) + 1e-6 * torch.eye(dim).to(training)
    fitted = MultivariateNormal(training.mean(0), covariance)
    prior = vae.model.prior()
    blocks = {
        "autoencoder\nz ~ N(0, I)": autoencoder.decode(prior.sample((count,))).mean,
        "autoencoder\nz ~ normal fit\nto its codes": autoencoder.decode(
            fitted.sample((count,))
        ).mean,
        "VAE\nz ~ N(0, I)": vae.decode(prior.sample((count,))).mean,
    }
    return plots.grid(
        torch.cat(list(blocks.values())).clamp(0, 1),
        count // 2,
        title="Mean images at draws from the latent space",
        row_labels=[label for name in blocks for label in (name, "")],
    )


def plane(name: str, subject: Subject, study: Study) -> Figure:
    """The codes of test images, and the circle that contains 95 % of N(0, I)."""
    test = study.data.test
    figure = plots.latents(
        results.codes(subject, test),
        test.labels,
        names=study.dataset.class_names,
        title=f"{name}: codes of test images; circle: 95 % of N(0, I)",
    )
    radius = math.sqrt(-2 * math.log(0.05))  # |z|^2 / 2 of a 2-D standard normal is exponential
    figure.axes[0].add_patch(Circle((0, 0), radius, fill=False, linewidth=1.2, linestyle="--"))
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("An autoencoder beside the VAE of the same networks.", resumable=True)
    parser.set_defaults(learning_rate=2e-3)
    group = parser.add_argument_group("networks")
    what = "p(x|z): cross-entropy on binarised pixels, or squared error on grey ones"
    cli.choice(group, "--likelihood", list(LOSSES), "bernoulli", what)
    cli.option(group, "--latent-dim", "of z; with 2 the codes are drawn too", cli.NATURAL, 20, "D")
    return cli.resumed(parser, argv)


if __name__ == "__main__":
    cli.run_main(main)
