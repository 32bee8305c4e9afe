r"""A linear VAE is probabilistic PCA: SVI is compared with an optimum in closed form.

The model z ~ N(0, I), x|z ~ N(W z + mu, s^2 I) with k latents has p(x) = N(mu, W W' + s^2 I). Its
maximum likelihood has a closed form. With the eigenvalues l_1 >= l_2 >= ... of the data's
covariance, the first k eigenvectors U, and D pixels,

    s^2 = mean(l_k+1, ..., l_D),    W = U (L - s^2 I)^(1/2),
    log p(x) = -1/2 [D ln 2 pi + sum_i<=k ln l_i + (D - k) ln s^2 + D]     on average over the data.

The posterior N(M^-1 W' (x - mu), s^2 M^-1), M = W' W + s^2 I, has a diagonal covariance if the
columns of W are orthogonal, as they are above. There a linear encoder with a diagonal normal is
exact, ELBO = log p(x), so SVI, which gets only the two programs, must reach the closed form. A
rotation of the latent axes, W R with an orthogonal R, does not change p(x), but the ELBO of the
diagonal normal is then lower by KL = 1/2 (sum_i ln M_ii - ln |M|). The figure shows both.

Sources: Probabilistic principal component analysis (1999), J. R. Statist. Soc. B 61; Don't blame
the ELBO! (2019), arXiv:1911.02469.
"""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor
from tqdm import tqdm

import pvae
from pvae import cli, data, evaluate, heads, tables
from pvae.closed_form import LinearGaussian
from pvae.nets import MLP
from pvae.priors import StandardNormal
from pvae.study import start

SIZES = (2, 10, 20, 50)  # latent dimensions of the table


def linear_vae(image_shape: Sequence[int], latent_dim: int) -> pvae.VAE:
    """A pair: a linear decoder with one learned scale, a linear encoder with a diagonal normal."""
    likelihood = heads.NormalSharedScale(image_shape, min_scale=0.0)
    posterior = heads.Normal((latent_dim,))
    decoder = MLP((latent_dim,), likelihood.param_shape, hidden=())
    encoder = MLP(image_shape, posterior.param_shape, hidden=())
    return pvae.VAE(
        pvae.Model(StandardNormal(latent_dim), pvae.Conditional(decoder, likelihood, event_dim=1)),
        pvae.Guide(pvae.Conditional(encoder, posterior, event_dim=3)),
    )


def as_exact(vae: pvae.VAE) -> LinearGaussian:
    """The linear Gaussian model that the decoder has learned, in float64."""
    likelihood: Any = vae.model.likelihood
    weight, mean = (t.detach().cpu().double() for t in likelihood.net.out.parameters())
    return LinearGaussian(weight, mean, likelihood.head.log_scale.exp().item())


@torch.no_grad()
def put(exact: LinearGaussian, vae: pvae.VAE) -> None:
    """Sets the decoder to `exact`, and the encoder to the best diagonal normal for it: the
    posterior's mean, and the variances 1 / P_dd of its precision P = M / s^2."""
    likelihood: Any = vae.model.likelihood
    likelihood.net.out.weight.copy_(exact.weight)
    likelihood.net.out.bias.copy_(exact.mean)
    likelihood.head.log_scale.fill_(exact.scale).log_()
    to_loc = torch.linalg.solve(exact.precision, exact.weight.T / exact.scale**2)  # (k, D)
    posterior: Any = vae.guide.posterior
    posterior.net.out.weight.copy_(torch.cat([to_loc, torch.zeros_like(to_loc)]))
    log_variance = -exact.precision.diagonal().log()
    posterior.net.out.bias.copy_(torch.cat([-to_loc @ exact.mean, log_variance]))


def turned(exact: LinearGaussian, turn: Tensor, amount: float) -> LinearGaussian:
    """W R with the rotation R = exp(amount A), A = `turn` antisymmetric `(k, k)`."""
    return LinearGaussian(
        exact.weight @ torch.linalg.matrix_exp(amount * turn), exact.mean, exact.scale
    )


def elbo(vae: pvae.VAE, x: Tensor) -> float:
    """The mean ELBO in nats per image, by Pyro's traces, with 32 draws for each image."""
    return evaluate.elbo(vae.model, vae.guide, x, num_samples=32).elbo.mean().item()


def train(
    vae: pvae.VAE,
    images: Tensor,
    watched: Tensor,
    *,
    epochs: int,
    batch_size: int,
    rate: float,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Trains by stock SVI; returns the ELBO and the exact log p of `watched` at some steps."""
    adam = torch.optim.Adam(vae.parameters(), lr=rate)
    objective = TraceMeanField_ELBO(max_plate_nesting=1)  # the KL is analytic: less noise
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective)
    steps = epochs * -(-len(images) // batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)  # to 0: without noise
    seen = {round(steps ** (i / 40)) for i in range(41)}  # evenly in the logarithm
    rows = []
    batches = (b for _ in range(epochs) for b in torch.randperm(len(images)).split(batch_size))
    bar = tqdm(batches, "SVI", total=steps, leave=False, disable=quiet or None)
    for step, index in enumerate(bar, start=1):
        svi.step(data.pixels(images[index.to(images.device)]))
        cosine.step()
        if step in seen:
            log_p = log_evidence(as_exact(vae), watched)
            rows.append({"step": step, "elbo": elbo(vae, watched), "log_evidence": log_p})
    return rows


def log_evidence(exact: LinearGaussian, images: Tensor) -> float:
    """The mean of log p(x) over `images` `(N, C, H, W)` in float64, 5,000 images at a time."""
    parts = [exact.log_evidence(data.pixels(x).cpu().double()) for x in images.split(5000)]
    return torch.cat(parts).mean().item()


def fitted(images: Tensor, latent_dim: int) -> LinearGaussian:
    """Probabilistic PCA of `images` `(N, C, H, W)`, in float64."""
    return LinearGaussian.fit(data.pixels(images).cpu().double(), latent_dim)


def figure(
    rows: Sequence[dict[str, float]], best: float, turns: Sequence[dict[str, float]]
) -> Figure:
    """Left: the distance of training to the optimum (log scale); right: the gap as W is turned.

    The titles give the distance at the end, and the effect of the turns.
    """
    drawn = Figure((9.5, 4), dpi=110, layout="constrained")
    left, right = drawn.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for key, label, colour in (
        ("elbo", "ELBO of the pair", "#3f90da"),
        ("log_evidence", "log p(x) of its decoder", "#bd1f01"),
    ):
        left.plot(steps, [best - row[key] for row in rows], ".-", color=colour, label=label)
    left.axhline(0.5, color="0.6", linestyle="--", label="0.5 nats")
    left.set(xscale="log", yscale="log", xlabel="step of SVI")
    left.set_ylabel("nats per image below the optimum")
    lacks = best - rows[-1]["log_evidence"]
    left.set_title(f"SVI ends {lacks:.2f} nats below probabilistic PCA, {best:.2f}", fontsize=10)

    amounts = [row["amount"] for row in turns]
    right.plot(amounts, [row["formula"] for row in turns], color="0.5", label="closed form")
    right.plot(
        amounts, [row["pyro"] for row in turns], "o", color="#832db6", label="log p(x) - ELBO, Pyro"
    )
    right.set(xlabel="turn of the latent axes, W exp(t A)", ylabel="nats per image")
    moved = max(abs(row["log_p"] - best) for row in turns)
    right.set_title(
        f"W turned: log p(x) moves by {moved:.0e}, the gap to {turns[-1]['formula']:.2g}",
        fontsize=10,
    )
    for axes in (left, right):
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("A linear VAE by SVI against probabilistic PCA, its closed form.")
    cli.option(parser, "--latent-dim", "latents that SVI trains", cli.NATURAL, 10, "K")
    parser.set_defaults(learning_rate=1e-2, batch_size=500)
    args = parser.parse_args(argv)
    study = start(args, "ppca", "grey")

    # all training images, including those that other examples use for validation
    images = torch.cat([study.data.train.images, study.data.validation.images])
    test = study.data.test.images
    forms = []
    for k in SIZES:
        best = fitted(images, k)
        on_train, on_test = log_evidence(best, images), log_evidence(best, test)
        forms.append({"k": k, "variance": best.scale**2, "train": on_train, "test": on_test})
    print(
        tables.columns(
            f"{study.dataset.name}, {len(images):,} images / 255: probabilistic PCA, closed form, "
            "log p(x) in nats per image",
            ["k", "s^2", "training", "test"],
            [
                [f"{f['k']}", f"{f['variance']:.6f}", f"{f['train']:.3f}", f"{f['test']:.3f}"]
                for f in forms
            ],
        )
    )

    # SVI, compared with the closed form on images spread over the training set
    best = fitted(images, args.latent_dim)
    watched = data.pixels(images[:: max(1, len(images) // 2000)])
    vae = linear_vae(study.dataset.image_shape, args.latent_dim).to(study.device)
    decoder: Any = vae.model.likelihood.net
    decoder.set_output_bias(study.dataset.mean_image)
    rows = train(
        vae,
        images,
        watched,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        rate=args.learning_rate,
        quiet=args.quiet,
    )
    found, optimum = as_exact(vae), log_evidence(best, watched)
    reached = {
        "train": log_evidence(found, images),
        "train_optimum": log_evidence(best, images),
        "test": log_evidence(found, test),
        "elbo": elbo(vae, watched),
        "elbo_optimum": optimum,
    }
    print(
        tables.columns(
            f"k = {args.latent_dim} by SVI, nats per image; s^2 = {found.scale**2:.6f}",
            ["", "trained", "closed form", "lacks"],
            [
                [label, f"{reached[key]:.3f}", f"{most:.3f}", f"{most - reached[key]:.3f}"]
                for label, key, most in (
                    ("log p(x), training images", "train", reached["train_optimum"]),
                    ("log p(x), test images", "test", log_evidence(best, test)),
                    (f"ELBO, {len(watched):,} training images", "elbo", optimum),
                )
            ],
        )
    )

    # turned axes: p(x) is the same; the gap in closed form and by Pyro
    a = torch.randn(args.latent_dim, args.latent_dim, dtype=torch.float64)
    turns = []
    for amount in torch.linspace(0, 0.5, 11).tolist():
        exact = turned(best, (a - a.T) / 2, amount)
        put(exact, vae)
        log_p = log_evidence(exact, watched)
        gaps = {"formula": exact.mean_field_gap(), "pyro": log_p - elbo(vae, watched)}
        turns.append({"amount": amount, "log_p": log_p, **gaps})
    print(
        tables.columns(
            "the optimum with its axes turned, nats per image",
            ["turn", "log p(x)", "gap, closed form", "gap, Pyro's ELBO"],
            [
                [f"{t['amount']:.2f}", *(f"{t[n]:.3f}" for n in ("log_p", "formula", "pyro"))]
                for t in turns[::2]
            ],
        )
    )
    numbers = {"closed_form": forms, "svi": rows, "reached": reached, "turned": turns}
    study.save(numbers, ppca=figure(rows, optimum, turns))
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


if __name__ == "__main__":
    cli.run_main(main)
