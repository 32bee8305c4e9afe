r"""Amortized inference against inference for each image: what one encoder for all images costs.

A VAE's encoder gives the posterior of every image. Instead, each image may have a variational
factor of its own, a loc and a scale, optimized for this image with the same decoder. Then

    log p(x) - ELBO(encoder)  =  log p(x) - ELBO(factor)           approximation gap: the family
                              +  ELBO(factor) - ELBO(encoder)      amortization gap: the sharing

and the program prints both gaps for test images, in nats per image, with their standard errors.
The factors start at the encoder's output, the decoder is frozen, and IWAE-500 bounds log p(x).

The folder of the run holds the pair: `pvae.load` and `python -m pvae.evaluate` take it.

Source: Inference Suboptimality in Variational Autoencoders (2018), arXiv:1801.03558.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from tqdm import tqdm

import pvae
from pvae import cli, data, evaluate, plots, tables
from pvae.evaluate import Estimate
from pvae.study import fit, start
from pvae.train import spread
from pvae.vae import VAE

DRAWS = 64  # of z for each image, in every ELBO that is reported


def elbos(vae: VAE, guide: Callable[..., Any], x: Tensor, seed: int) -> Tensor:
    """ELBO of each image `(N,)`; two guides with the same seed get the same noise."""
    with evaluate.fixed_noise(x.device, seed):
        return evaluate.elbo(vae.model, guide, x, num_samples=DRAWS).elbo


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("The amortization gap: one encoder against a factor for each image.")
    cli.option(parser, "--latent-dim", "latent dimension", cli.NATURAL, 16, "D")
    cli.option(parser, "--images", "test images", cli.NATURAL, 500, "N")
    cli.option(parser, "--steps", "steps of the factors", cli.NATURAL, 1000, "S")
    args = parser.parse_args(argv)
    study = start(args, "amortization", "dynamic")

    # a VAE of one hidden layer each way
    dataset = study.dataset
    vae = pvae.build(dataset.image_shape, args.latent_dim, "mlp", mean_image=dataset.mean_image)
    vae.to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    fit(study, vae, svi).restore_best()

    x = data.pixels(study.data.test.first(args.images).images)
    factors = evaluate.one_factor_each(vae.guide, x)
    per_image = partial(factors, index=torch.arange(len(x), device=x.device))

    # optimize the factors, and record their ELBO at 40 steps
    encoder = elbos(vae, vae.guide, x, args.seed)
    path = {0: elbos(vae, per_image, x, args.seed).mean().item()}
    watched = spread(args.steps, 40)
    with tqdm(total=args.steps, desc="factors", leave=False, disable=args.quiet or None) as bar:

        def on_step(step: int) -> None:
            bar.update()
            if step in watched:
                path[step] = elbos(vae, per_image, x, args.seed).mean().item()

        evaluate.optimize_factors(vae.model, factors, x, steps=args.steps, on_step=on_step)

    factor = elbos(vae, per_image, x, args.seed)
    with evaluate.fixed_noise(x.device, args.seed):
        iwae = evaluate.importance_weighted(vae.model, per_image, x, num_samples=500)
    quantities = {
        "ELBO, encoder": encoder,
        "ELBO, one factor for each image": factor,
        "IWAE-500 bound on log p(x)": iwae,
        "amortization gap": factor - encoder,
        "approximation gap": iwae - factor,
    }
    estimates = {name: evaluate.estimate(values) for name, values in quantities.items()}
    study.save(
        {name: e._asdict() for name, e in estimates.items()},
        amortization=drawn(path, estimates, factor - encoder),
        largest_gaps=worst(vae, per_image, x, factor - encoder),
    )
    print(
        tables.columns(
            f"{dataset.name}, {len(x)} test images, {study.data.label}, nats per image",
            ["", "mean", "standard error"],
            [[name, f"{e.mean:.2f}", f"{e.se:.2f}"] for name, e in estimates.items()],
        )
    )
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def drawn(path: Mapping[int, float], estimates: Mapping[str, Estimate], gaps: Tensor) -> Figure:
    """Left: the ELBO of the factors at each step; right: the amortization gap of each image."""
    figure = Figure((9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    encoder, bound = (estimates[k].mean for k in ("ELBO, encoder", "IWAE-500 bound on log p(x)"))
    left.axhline(bound, color="0.6", linestyle="--", label=f"IWAE-500: {bound:.2f}")
    left.plot(path.keys(), path.values(), ".-", color="#3f90da", label="one factor for each image")
    left.axhline(encoder, color="#bd1f01", label=f"encoder: {encoder:.2f}")
    left.set(xlabel="step", ylabel="ELBO, nats per image")
    left.set_title("The factors, optimized from the encoder's output", fontsize=10)
    left.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))

    gap = estimates["amortization gap"]
    right.hist(gaps.cpu().numpy(), bins=40, color="#3f90da")
    right.axvline(gap.mean, color="black", linestyle=":")
    right.set(xlabel="ELBO(factor) - ELBO(encoder), nats", ylabel="images")
    right.set_title(f"Amortization gap: {gap.mean:.2f} ± {gap.se:.2f} nats per image", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def worst(vae: VAE, per_image: Callable[..., Any], x: Tensor, gaps: Tensor) -> Figure:
    """The images of the largest gaps, reconstructed by the encoder and by their own factor."""
    chosen = gaps.argsort(descending=True)[:12]
    means = (evaluate.posterior_means(guide, x)[chosen] for guide in (vae.guide, per_image))
    with torch.no_grad():
        by_encoder, by_factor = (vae.decode(z).mean for z in means)
    return plots.grid(
        torch.cat([x[chosen], by_encoder, by_factor]),
        len(chosen),
        title="Test images of the largest amortization gaps, nats",
        row_labels=["x", "encoder", "own factor"],
        column_labels=[f"{gap:.1f}" for gap in gaps[chosen].tolist()],
    )


if __name__ == "__main__":
    cli.run_main(main)
