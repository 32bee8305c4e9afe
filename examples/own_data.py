r"""Your own data: from a folder of pictures, or from a table of counts, to the evaluation.

    python examples/own_data.py --dataset my_pictures/
    python examples/own_data.py --dataset my_counts.npz

The data decide the parts: binarised pictures get a Bernoulli likelihood, counts a Poisson, and
other numbers, standardised, a normal with a learned scale. Without `--dataset` the program makes
two inputs itself: pictures of scikit-learn's digits, in folders of training, validation and test
images, and counts drawn from a known Poisson model,

    z ~ N(0, I) in R^2,    x_i ~ Poisson(exp(b_i + w_i z)).

Quadrature over the plane of z gives log p(x) of this model, and no bound of a trained pair can
exceed it by more than noise. docs/own-data.md says what a file or folder may hold.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pvae
from pvae import cli, closed_form, data, evaluation, run
from pvae.study import finish, fit, start


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.dataset is not None:
        train(args, "own_data")
        return
    folder = run.new_folder(args.out, "own_data")
    for name, write in {"pictures": write_pictures, "counts.npz": write_counts}.items():
        write(folder / "inputs" / name)
        args.dataset, args.out = str(folder / "inputs" / name), str(folder / Path(name).stem)
        dataset = train(args, "own_data")
    exact = log_evidence(dataset.test.images)
    print(f"log p(x) of the model that made the counts: {exact.mean():.2f} nats per test datum")


def train(args: argparse.Namespace, name: str) -> data.Dataset:
    """Trains a pair that suits the data, then does a part of the full evaluation."""
    found = data.load(args.dataset, args.data_root, seed=args.data_seed, split=args.split)
    net, likelihood, how = parts(found)
    args.standardize = likelihood == "gaussian_shared"
    study = start(args, name, how)
    vae = pvae.build(
        study.dataset.image_shape,
        args.latent_dim,
        net,
        likelihood,
        mean_image=study.data.mean_image,
    ).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    finish(study, fit(study, vae, svi), quiet=True)
    left_out = ["--annealed-images", "0", "--gap-images", "0", "--nuts-samples", "0", "--quiet"]
    few = ["--images", "100", "--num-samples", "100", *left_out]
    evaluation.main([str(study.folder), "--device", args.device, *few])
    return study.dataset


def parts(dataset: data.Dataset) -> tuple[str, str, str]:
    """The net, the likelihood and the observation that suit the data."""
    x = dataset.train.images
    if dataset.pictures:
        return "conv", "bernoulli", "dynamic"
    if (x >= 0).all() and (x == x.round()).all():
        return "mlp", "poisson", "as_is"
    return "mlp", "gaussian_shared", "as_is"


# ---- the inputs that the program makes itself ----


def write_pictures(folder: Path, most: int = 300) -> None:
    """Digits as a folder `split/label/number.png`."""
    digits = data.load("digits")
    for name, split in zip(("train", "validation", "test"), digits.splits, strict=True):
        part = split.first(most)
        assert part.labels is not None
        for i, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
            path = folder / name / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)


def model(size: int = 24) -> tuple[Tensor, Tensor]:
    """`w (2, size)` and `b (size,)`: the log-rates are waves over the index of the counts; phase
    and height of a wave are the angle and the radius of z."""
    angle = torch.linspace(0, 4 * torch.pi, size)
    return 0.8 * torch.stack([angle.cos(), angle.sin()]), torch.full((size,), 1.0)


def write_counts(path: Path, size: int = 1000) -> None:
    """Counts of the known model: the last tenth is for test, the tenth before for validation."""
    weight, bias = model()
    draw = np.random.default_rng(0)
    z = draw.standard_normal((size, len(weight)))
    x = draw.poisson(np.exp(bias.numpy() + z @ weight.numpy()))
    first, second = size * 8 // 10, size * 9 // 10
    path.parent.mkdir(exist_ok=True)
    np.savez(path, train=x[:first], validation=x[first:second], test=x[second:])


def log_evidence(x: Tensor) -> Tensor:
    """`log p(x)` of counts `(B, size)` under the known model, by a sum over a grid of z, `(B,)`."""
    weight, bias = model(x.shape[1])
    axis = torch.linspace(-6, 6, 121)
    z = torch.cartesian_prod(axis, axis)[:, None]  # (S, 1, 2)
    log_prior = -(z**2).sum(-1) / 2 - np.log(2 * np.pi)
    log_joint = log_prior + closed_form.poisson(x, bias + z @ weight)  # (S, B)
    return log_joint.logsumexp(0) + 2 * np.log(12 / 120)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = "pictures and counts that it makes itself"
    parser = cli.study_parser("Data of one's own, from files to the evaluation.", default_data=made)
    parser.set_defaults(batch_size=64)
    cli.option(parser, "--latent-dim", "dimension of z", cli.NATURAL, 2, "D")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main)
