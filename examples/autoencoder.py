r"""An autoencoder beside the VAE of the same networks: what sampling its latent space gives.

The VAE's encoder is one network whose output is split into loc and log-variance,

    z = loc(x) + exp(log_variance(x) / 2) noise,   loss = E[-log p(x|z)] + KL(q(z|x) || N(0, I)).

The autoencoder is its limit without noise and without KL, in plain torch:

    z = loc(x),                                    loss = -log p(x|z),

with -log p(x|z) the cross-entropy (Bernoulli) or half the squared error (normal of scale 1, up to
a constant). It reconstructs better, as no KL holds its codes to N(0, I). For that very reason
draws from N(0, I) miss its codes and decode to little; a normal fitted to the codes afterwards
meets their mean and covariance, but not their shape. The VAE is sampled from its own prior.

Source: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114.
"""

import argparse
import math
import time
from typing import Any, NamedTuple

import pyro
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

import pvae
from pvae import cli, data, evaluate, plots, report, run
from pvae.builder import LIKELIHOODS, OBJECTIVES
from pvae.train import Trainer, learning_rate_factor
from pvae.vae import VAE

WARMUP = 0.05  # fraction of training in which learning rate and KL weight rise


def cross_entropy(h: Tensor, x: Tensor) -> Tensor:
    """`-log p(x|z)` of Bernoulli pixels with logits `h`, summed over images."""
    return F.binary_cross_entropy_with_logits(h, x, reduction="sum")


def half_squared_error(h: Tensor, x: Tensor) -> Tensor:
    """`-log p(x|z)` of normal pixels with loc `h` and scale 1, but for `log(2 pi) / 2` a pixel."""
    return F.mse_loss(h, x, reduction="sum") / 2


LOSSES = {"bernoulli": cross_entropy, "gaussian": half_squared_error}


def autoencoder_loss(x: Tensor, encoder: nn.Module, decoder: nn.Module, likelihood: str) -> Tensor:
    """`-log p(x | z = loc(x))` summed over images `(B, C, H, W)`: no noise and no KL."""
    loc, _ = encoder(x).chunk(2, dim=-1)  # the log-variance is not used
    return LOSSES[likelihood](decoder(loc), x)


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    binary = LIKELIHOODS[args.likelihood].binary
    study = cli.start_study(args, "autoencoder", "dynamic" if binary else "grey")
    pairs = {"autoencoder": build(study, args), "VAE": build(study, args)}
    train_autoencoder(pairs["autoencoder"], study, args)
    train_vae(pairs["VAE"], study, args)

    numbers: dict[str, Any] = {name: at_codes(pair, study) for name, pair in pairs.items()}
    numbers["VAE"] |= bound(pairs["VAE"], study, args.seed)  # the autoencoder has no posterior
    with evaluate.evaluating(*pairs.values()), evaluate.fixed_noise(study.device, args.seed):
        figures = {
            "reconstructions": reconstructions(pairs, numbers, study),
            "samples": samples(pairs, study),
        }
        if args.latent_dim == 2:
            figures |= {f"codes_{name}": plane(name, pair, study) for name, pair in pairs.items()}
    for name, figure in figures.items():
        plots.save(figure, study.folder / f"{name}.png")
    numbers["seconds"] = time.perf_counter() - start
    run.write_json(study.folder / "results.json", numbers)
    print(table(numbers, study, args))
    print(f"{numbers['seconds']:.0f} s; pictures and numbers: {study.folder}/")


def build(study: cli.Study, args: argparse.Namespace) -> VAE:
    """The same networks from the same start, for the one and the other."""
    pyro.set_rng_seed(args.seed)
    return pvae.build(
        study.dataset.image_shape,
        args.latent_dim,
        "mlp",
        args.likelihood,
        hidden=400,
        mean_image=data.pixels(study.dataset.train.images).mean(0),
    ).to(study.device)


def train_autoencoder(pair: VAE, study: cli.Study, args: argparse.Namespace) -> None:
    """Trains the pair's two networks alone: neither Pyro nor a distribution takes part."""
    encoder = pair.guide.posterior.get_submodule("net")
    decoder = pair.model.likelihood.get_submodule("net")
    images = len(study.observed.train.images)
    total = args.num_epochs * -(-images // args.batch_size)
    adam = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()], lr=args.learning_rate, fused=True
    )
    schedule = LambdaLR(adam, lambda step: learning_rate_factor(step, total, warmup=WARMUP))
    epochs = trange(args.num_epochs, desc="autoencoder", disable=True if args.quiet else None)
    for epoch in epochs:
        summed = 0.0
        for x, _ in study.observed.batches(args.batch_size, seed=args.seed, epoch=epoch):
            loss = autoencoder_loss(x, encoder, decoder, args.likelihood)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            summed += loss.item()
        epochs.set_postfix(loss=summed / images)


def train_vae(vae: VAE, study: cli.Study, args: argparse.Namespace) -> None:
    objective = OBJECTIVES["trace_mean_field_elbo"]  # its KL in closed form
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(1))
    Trainer(
        vae,
        svi,
        objective,
        study.observed,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        kl_warmup=WARMUP,
        lr_warmup=WARMUP,
        seed=args.seed,
        quiet=args.quiet,
    ).fit()


# ---- what each is worth ----


class AtCode(NamedTuple):
    """At `z = loc(x)`, for each image: the code `(B, D)`; log p(x|z) in nats and the squared error
    of the mean image, both summed over pixels, `(B,)`."""

    code: Tensor
    log_prob: Tensor
    squared_error: Tensor


def at_codes(pair: VAE, study: cli.Study) -> dict[str, float]:
    """Means over the test images, and how many units of the code vary over them."""

    def at_code(x: Tensor, y: Tensor | None) -> AtCode:
        z = pair.encode(x).mean
        p = pair.decode(z)
        return AtCode(z, p.log_prob(x), (p.mean - x).square().sum(dim=(1, 2, 3)))

    with evaluate.evaluating(pair):
        at = evaluate.over(study.observed.test, at_code, batch_size=500, seed=0)
    return {
        "log_prob_at_code": at.log_prob.mean().item(),
        "squared_error": at.squared_error.mean().item(),
        "active_units": int((evaluate.unit_variances(at.code) > 0.01).sum()),
    }


def bound(vae: VAE, study: cli.Study, seed: int) -> dict[str, float]:
    def elbo(x: Tensor, y: Tensor | None) -> evaluate.Bound:
        return evaluate.elbo(vae.model, vae.guide, x)

    terms = evaluate.over(study.observed.test, elbo, batch_size=500, seed=seed)
    return {name: term.mean().item() for name, term in terms._asdict().items()}


def table(numbers: dict[str, Any], study: cli.Study, args: argparse.Namespace) -> str:
    keys = ("log_prob_at_code", "reconstruction", "kl", "elbo", "squared_error")
    rows = []
    for name in ("autoencoder", "VAE"):
        of = numbers[name]
        cells = [f"{of[key]:.2f}" if key in of else "none" for key in keys]
        rows.append([name, *cells, f"{of['active_units']} of {args.latent_dim}"])
    header = ["log p(x|z = loc)", "E_q log p(x|z)", "KL", "ELBO", "squared error", "active units"]
    what = f"{study.dataset.name} test set, {args.likelihood} pixels ({study.observed.how})"
    return report.columns(
        f"{what}, per image, in nats but for the squared error\n"
        "  (log p(x|z = loc) is a reconstruction term only: it bounds nothing)",
        ["", *header],
        rows,
    )


# ---- pictures ----


def reconstructions(pairs: dict[str, VAE], numbers: dict[str, Any], study: cli.Study) -> Figure:
    x = data.pixels(study.observed.test.images[:16])
    rows = [x, *(pair.reconstruct(x).clamp(0, 1) for pair in pairs.values())]
    nats = ", ".join(f"{name} {numbers[name]['log_prob_at_code']:.1f}" for name in pairs)
    return plots.grid(
        torch.cat(rows),
        len(x),
        title=f"Test images and reconstructions; log p(x|z = loc), nats an image: {nats}",
        row_labels=["x", *pairs],
    )


def samples(pairs: dict[str, VAE], study: cli.Study, count: int = 32) -> Figure:
    """Mean images of both at N(0, I), of the autoencoder at a normal fitted to its codes too."""
    autoencoder, vae = pairs.values()
    training = torch.cat(
        [autoencoder.encode(x).mean for x, _ in data.chunks(study.observed.train, 500)]
    )
    dim = training.shape[1]
    # a little is added to the variances, as a code that never varies would make them singular
    covariance = training.T.cov().reshape(dim, dim) + 1e-6 * torch.eye(dim, device=study.device)
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


def plane(name: str, pair: VAE, study: cli.Study) -> Figure:
    """The codes of test images, and the circle that holds 95 % of N(0, I)."""
    images, y = study.observed.test
    z = torch.cat([pair.encode(x).mean for x, _ in data.chunks(data.Split(images, y), 500)])
    figure = plots.latents(z, y, title=f"{name}: codes of test images; circle: 95 % of N(0, I)")
    radius = math.sqrt(-2 * math.log(0.05))  # |z|^2 / 2 of a 2-D standard normal is exponential
    figure.axes[0].add_patch(Circle((0, 0), radius, fill=False, linewidth=1.2, linestyle="--"))
    return figure


def arguments() -> argparse.Namespace:
    parser = cli.study_parser("An autoencoder beside the VAE of the same networks.")
    parser.set_defaults(learning_rate=2e-3)
    group = parser.add_argument_group("networks")
    group.add_argument(
        "--likelihood",
        choices=list(LOSSES),
        default="bernoulli",
        help="p(x|z): cross-entropy on binarised pixels, or squared error on grey ones",
    )
    group.add_argument(
        "--latent-dim",
        type=int,
        default=20,
        metavar="D",
        help="latent dimension; with 2 the codes are drawn too",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run_main(main)
