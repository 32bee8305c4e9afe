r"""A VAE and its conditional VAE: the label joins the encoder and the decoder.

    VAE     log p(x)   >=  E_q(z|x)[log p(x|z)]      - KL(q(z|x) || p(z))
    CVAE    log p(x|y) >=  E_q(z|x,y)[log p(x|z,y)]  - KL(q(z|x,y) || p(z))

Both are multilayer perceptrons 784-400-20. Told the label y, z is left with what the label does
not say, the *style*: one z decoded under every label gives one style of every class.

The two bounds are on different things. With p(y) = 1/K for each of K classes,
p(x) >= p(x, y) = p(x|y) / K: the CVAE's bound less log K nats is one on log p(x) too.

Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114; Semi-Supervised Learning with
Deep Generative Models (2014), arXiv:1406.5298, its model M2 with every label seen.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI

import pvae
from pvae import checkpoint, cli, data, evaluate, plots, report, run
from pvae.builder import OBJECTIVES
from pvae.train import Trainer
from pvae.vae import VAE

FASHION = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
]


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    study = cli.start_study(args, "cvae", "dynamic")
    kinds = [args.conditional] if args.conditional is not None else [False, True]
    if True in kinds and study.dataset.num_classes is None:
        raise ValueError(f"{study.dataset.name} has no labels to condition on: --no-conditional")

    numbers: dict[str, Any] = {}
    for labels in kinds:
        name = "CVAE" if labels else "VAE"
        numbers[name] = train(name, labels, study, args)
    numbers["seconds"] = time.perf_counter() - start
    run.write_json(study.folder / "results.json", numbers)
    print(table(numbers, study.dataset))
    print(f"{numbers['seconds']:.0f} s; pictures and numbers: {study.folder}/")


def train(name: str, labels: bool, study: cli.Study, args: argparse.Namespace) -> dict[str, float]:
    """Trains one of the two in a folder of its own, and returns its test numbers."""
    _, device, dataset, observed = study
    folder = study.folder / name.lower()
    folder.mkdir()
    vae = pvae.build(
        dataset.image_shape,
        args.latent_dim,
        "mlp",
        "bernoulli",
        hidden=400,
        num_classes=dataset.num_classes if labels else None,
        mean_image=data.pixels(dataset.train.images).mean(0),
    ).to(device)
    if not args.quiet:
        print(f"{name}: {sum(p.numel() for p in vae.parameters()):,} parameters; in {folder}/")

    objective = OBJECTIVES["trace_elbo"]
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(1))
    trainer = Trainer(
        vae,
        svi,
        objective,
        observed,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        kl_warmup=0.05,
        lr_warmup=0.05,
        labels=labels,
        seed=args.seed,
        folder=folder,
        quiet=args.quiet,
        on_epoch=progress(study, labels, args.num_epochs, folder),
    )
    trainer.fit()

    checkpoint.restore(vae, checkpoint.read(folder / "best.pt")["model"])
    numbers = report.results(vae, observed, labels=labels, seed=args.seed, quiet=args.quiet)
    history = trainer.history
    report.pictures(vae, observed, history, folder, numbers, labels=labels, seed=args.seed)
    if labels:
        plots.save(styles(vae, dataset), folder / "styles.png")
    return numbers


def progress(
    study: cli.Study, labels: bool, epochs: int, folder: Path
) -> Callable[[Trainer], None]:
    """Draws, as training goes on, the originals and the binary x of them on the left, and a column
    of reconstructions for each of about seven epochs on the right."""
    x, y = next(data.chunks(study.observed.validation, 8))
    columns = {"original": data.pixels(study.dataset.validation.images[:8]).to(x), "x": x}
    pictured = cli.spread(epochs, 7)

    def draw(trainer: Trainer) -> None:
        if trainer.epoch not in pictured:
            return
        with evaluate.evaluating(trainer.vae):
            columns[f"epoch {trainer.epoch}"] = trainer.vae.reconstruct(x, y if labels else None)
        elbo = trainer.history[-1]["validation_elbo"]
        figure = plots.grid(
            torch.stack(list(columns.values()), dim=1).flatten(0, 1),
            len(columns),
            title=f"Reconstructions as training goes on; ELBO {elbo:.1f} nats an image",
            column_labels=list(columns),
        )
        plots.save(figure, folder / "progress.png")

    return draw


@torch.no_grad()
def styles(vae: VAE, dataset: data.Dataset, count: int = 10) -> plots.Figure:
    """Draws `count` styles, one z a row, under each of the K labels."""
    assert dataset.num_classes is not None
    device = next(vae.parameters()).device
    y = torch.arange(dataset.num_classes, device=device)  # (K,)
    z = vae.model.prior(y).sample((count, 1))  # (count, 1, D)
    images = vae.decode(z, y).mean  # (count, K, C, H, W): z and y broadcast
    names = FASHION if dataset.name == "fashion-mnist" else [str(k) for k in y.tolist()]
    return plots.grid(
        images.flatten(0, 1),
        len(y),
        title="p(x|z, y): a row one style z, a column one label y",
        column_labels=names,
    )


def table(numbers: dict[str, Any], dataset: data.Dataset) -> str:
    bounds = {"VAE": "log p(x)", "CVAE": "log p(x|y)"}
    keys = ("test_elbo", "test_reconstruction", "test_kl", "iwae_500")
    rows = [
        [name, bound, *(f"{numbers[name][key]:.2f}" for key in keys)]
        for name, bound in bounds.items()
        if name in numbers
    ]
    if "CVAE" in numbers:
        less = math.log(dataset.num_classes or 1)
        both = [f"{numbers['CVAE'][key] - less:.2f}" for key in ("test_elbo", "iwae_500")]
        rows.append([f"CVAE - log {dataset.num_classes}", "log p(x)", both[0], "", "", both[1]])
    title = (
        f"{dataset.name} test set, dynamically binarised (one fixed draw), nats per image "
        "(IWAE: first 1,000 images)"
    )
    return report.columns(title, ["", "bound on", "ELBO", "reconstruction", "KL", "IWAE-500"], rows)


def arguments() -> argparse.Namespace:
    parser = cli.study_parser(
        "An MLP VAE and its conditional VAE, on garments or digits.",
        default_data="Fashion-MNIST where it is found, else MNIST, found or downloaded; offline, "
        "scikit-learn's digits",
    )
    parser.set_defaults(learning_rate=2e-3)
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        help="only the pair that is (or is not) conditional on the label (default: both)",
    )
    group.add_argument("--latent-dim", type=int, default=20, metavar="D", help="latent dimension")
    args = parser.parse_args()
    if args.dataset is None and data.is_found("fashion-mnist", args.data_root):
        args.dataset = "fashion-mnist"
    return args


if __name__ == "__main__":
    cli.run_main(main)
