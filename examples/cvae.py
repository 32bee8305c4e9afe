r"""A VAE and a conditional VAE, whose encoder and decoder take the label too.

    VAE     log p(x)   >=  E_q(z|x)[log p(x|z)]      - KL(q(z|x) || p(z))
    CVAE    log p(x|y) >=  E_q(z|x,y)[log p(x|z,y)]  - KL(q(z|x,y) || p(z))

Both are multilayer perceptrons 784-400-20. In the CVAE the label y is given, so z holds the rest of
the image, the *style*: one z decoded under every label gives one style of every class.

The two bounds are on different quantities. With p(y) = 1/K for each of K classes,
p(x) >= p(x, y) = p(x|y) / K: the CVAE's bound minus log K nats is also a bound on log p(x).

Many tutorials take the Bernoulli's cross-entropy on grey pixels, `--likelihood grey_bernoulli`. It
is no likelihood, as its exponential does not integrate to 1 over grey images: the objective then
bounds nothing. The same formula with its normalizer is `continuous_bernoulli`.

Each pair has its own run folder: `pvae.load` and `python -m pvae.evaluate` take it.

Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114; Semi-Supervised Learning with
Deep Generative Models (2014), arXiv:1406.5298, its model M2 with every label seen.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import cli, data, evaluate, plots, results, tables
from pvae.builder import LIKELIHOODS
from pvae.results import Row
from pvae.study import Study, finish, fit, start
from pvae.train import Trainer, spread
from pvae.vae import VAE


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    study = start(args, "cvae", data.usual_observation(LIKELIHOODS[args.likelihood].data))
    kinds = [args.conditional] if args.conditional is not None else [False, True]
    if True in kinds and study.dataset.num_classes is None:
        raise ValueError(f"{study.dataset.name} has no labels to condition on: --no-conditional")

    rows = {}
    for conditional in kinds:
        name = "CVAE" if conditional else "VAE"
        vae, rows[name] = train(study.part(name.lower()), conditional)
    numbers = {name: results.as_json(of) for name, of in rows.items()}
    study.save({"numbers": numbers, "seconds": study.seconds})
    print(table(rows, study, vae.normalized))
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def train(study: Study, conditional: bool) -> tuple[VAE, list[Row]]:
    """Trains one of the two pairs; returns the pair and its test numbers."""
    args, dataset = study.args, study.dataset
    pyro.set_rng_seed(args.seed)
    vae = pvae.build(
        dataset.image_shape,
        args.latent_dim,
        "mlp",
        args.likelihood,
        hidden=400,
        num_classes=dataset.num_classes if conditional else None,
        mean_image=study.data.mean_image,
    ).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    trainer = fit(study, vae, svi, on_epoch=progress(study))
    rows = finish(study, trainer, quiet=True)
    if conditional:
        plots.save(styles(vae, dataset), study.folder / "styles.png")
    return vae, rows


def progress(study: Study) -> Callable[[Trainer], None]:
    """Draws a picture during training: on the left the original images and the pair's input, on the
    right a column of reconstructions for each of about seven epochs."""
    first = study.data.validation.first(8)
    x = data.pixels(first.images)
    original = data.pixels(study.dataset.validation.first(8).images).to(x)
    columns = {"original": original} if x.equal(original) else {"original": original, "x": x}
    pictured = spread(study.args.num_epochs, 7)

    def draw(trainer: Trainer) -> None:
        if trainer.epoch not in pictured:
            return
        vae = trainer.vae
        columns[f"epoch {trainer.epoch}"] = vae.reconstruct(x, vae.given(first.y)).clamp(0, 1)
        elbo = trainer.history[-1]["validation_elbo"]
        figure = plots.grid(
            torch.stack(list(columns.values()), dim=1).flatten(0, 1),
            len(columns),
            title=f"Reconstructions as training goes on; ELBO {elbo:.1f} nats an image",
            column_labels=list(columns),
        )
        plots.save(figure, study.folder / "progress.png")

    return draw


def styles(vae: VAE, dataset: data.Dataset, count: int = 10) -> plots.Figure:
    """Decodes `count` styles, one z for each row, under each of the K labels."""
    device = next(vae.parameters()).device
    y = torch.arange(dataset.num_classes or 1, device=device)  # (K,)
    with evaluate.evaluating(vae):
        z = vae.model.prior(y).sample((count, 1))  # (count, 1, D)
        images = vae.decode(z, y).mean  # (count, K, C, H, W): z and y broadcast
    return plots.grid(
        images.flatten(0, 1).clamp(0, 1),
        len(y),
        title="p(x|z, y): a row one style z, a column one label y",
        column_labels=dataset.class_names or [str(k) for k in y.tolist()],
    )


def table(rows: Mapping[str, Sequence[Row]], study: Study, normalized: bool) -> str:
    """Both pairs side by side; if the likelihood is not normalized, they are bounds on nothing."""
    keys = ("elbo", "distortion", "rate", "iwae_100")
    bounds = {"VAE": "log p(x)", "CVAE": "log p(x|y)"}
    shown = []
    for name, of in rows.items():
        value, images = {row.key: row.value.mean for row in of}, {row.key: row.images for row in of}
        numbers = [f"{value[key]:.2f}" for key in keys]
        shown.append([name, bounds[name] if normalized else "nothing", *numbers])
        if name == "CVAE" and normalized:
            classes = study.dataset.num_classes or 1
            elbo, iwae = (f"{value[key] - math.log(classes):.2f}" for key in (keys[0], keys[-1]))
            shown.append([f"CVAE - log {classes}", "log p(x)", elbo, "", "", iwae])
    title = (
        f"{study.dataset.name} test set, {study.data.label}, {study.args.likelihood} pixels; nats "
        f"per image over {images['elbo']:,} images (IWAE-100: {images['iwae_100']:,})"
    )
    if not normalized:
        title += "\n  p(x|z) is not a likelihood: compare these numbers with no other likelihood's"
    header = ["", "bound on", "ELBO", "distortion", "rate (KL)", "IWAE-100"]
    return tables.columns(title, header, shown)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser(
        "An MLP VAE and its conditional VAE, on garments or digits.",
        default_data="Fashion-MNIST where it is found, else MNIST, found or downloaded; offline, "
        "scikit-learn's digits",
        resumable=True,
    )
    parser.set_defaults(learning_rate=2e-3)
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        help="only the pair that is (or is not) conditional on the label (default: both)",
    )
    cli.choice(group, "--likelihood", LIKELIHOODS, "bernoulli", "p(x|z)")
    cli.option(group, "--latent-dim", "of z", cli.NATURAL, 20, "D")
    args = cli.resumed(parser, argv)
    if args.dataset is None and data.is_found("fashion-mnist", args.data_root):
        args.dataset = "fashion-mnist"
    return args


if __name__ == "__main__":
    cli.run_main(main)
