r"""The deep "vanilla VAE" with BatchNorm: its published loss is an ELBO with Gaussian pixels.

The published loss, on images mapped to [-1, 1] (D = C H W numbers each) and for a KL weight w, is

    L = mse(decoder(z), x) + w KL(q(z|x) || N(0, I)),      z ~ q(z|x).

For any fixed scale s of p(x|z) = N(decoder(z), s^2), with sq the squared error summed over an
image, the tempered ELBO is

    -ELBO_beta = sq / (2 s^2) + beta KL + D log(s sqrt(2 pi))            nats per image
               = D / (2 s^2) [sq / D + (2 s^2 beta / D) KL] + constant,

and the bracket is L where beta = w D / (2 s^2). So the loss does not determine s. At s^2 = w D / 2
the loss is the ELBO itself, beta = 1, and stock SVI takes the published steps; at every other scale
it is the loss of a beta-VAE. The table at the end evaluates the trained networks at three scales:
this one, 1, and the root mean squared error of a pixel. The published loss is the same at all
three, the ELBO (always at beta = 1) is not. Its nats are for images in [0, 1], as in every other
example: D log 2 above those for [-1, 1]. The networks are those of the last epoch. The pair is
composed by hand, so it has no recipe for `pvae.load`.

The published weight is w = batch size / images in the data set, about 0.0006 for batches of 128 of
200,000 images. For the patches here it is more than ten times as large, which makes the KL too
strong: the default is 0.00025.

Sources: the "vanilla VAE" of github.com/AntixK/PyTorch-VAE (2020); Auto-Encoding Variational Bayes
(2013), arXiv:1312.6114; Simple and Effective VAE Training with Calibrated Decoders (2020),
arXiv:2006.13202. The default data are 64x64 RGB patches of two photographs; no download is needed.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pvae
from pvae import cli, closed_form, data, evaluate, heads, plots, tables
from pvae.builder import LIKELIHOODS
from pvae.nets import Affine, DeepDecoder, DeepEncoder
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal
from pvae.schedule import Schedule
from pvae.study import Study, fit, start
from pvae.train import Trainer


def published(x: Tensor, mean: Tensor, kl: Tensor, weight: float) -> Tensor:
    """The loss L of each image `(B,)`, from images, the decoder's means and the KLs `(B,)`."""
    return (mean - x).square().flatten(1).mean(1) + weight * kl


def tempered(weight: float, elements: int, scale: float) -> float:
    """beta = w D / (2 s^2), at which the Gaussian ELBO of scale s is the published loss."""
    return weight * elements / (2 * scale**2)


def untempered(weight: float, elements: int) -> float:
    """s = sqrt(w D / 2), at which beta = w D / (2 s^2) is 1."""
    return math.sqrt(weight * elements / 2)


def normal(shape: Sequence[int], scale: float) -> heads.NormalFixedScale:
    """N(t, s^2) over images 2 x - 1 in [-1, 1] is N((t + 1) / 2, (s / 2)^2) over x in [0, 1]."""
    return heads.NormalFixedScale(shape, scale=scale / 2)


def deep_pair(
    shape: Sequence[int], latent_dim: int, widths: Sequence[int], scale: float
) -> pvae.VAE:
    """A pair for images in [0, 1], of the published networks, which work in [-1, 1]."""
    z_head, x_head = heads.Normal((latent_dim,)), normal(shape, scale)
    encoder = nn.Sequential(Affine(2, -1), DeepEncoder(shape, z_head.param_shape, widths))
    decoder = nn.Sequential(
        DeepDecoder((latent_dim,), shape, widths),
        nn.Tanh(),
        Affine(0.5, 0.5),
    )
    posterior = pvae.Conditional(encoder, z_head, event_dim=3)
    likelihood = pvae.Conditional(decoder, x_head, event_dim=1)
    by_hand = closed_form.ClosedForm(
        posterior.raw,
        likelihood.raw,
        closed_form.loc_log_variance,
        partial(LIKELIHOODS["gaussian"].log_likelihood, x_head),
    )
    model = pvae.Model(StandardNormal(latent_dim), likelihood)
    return pvae.VAE(model, pvae.Guide(posterior), by_hand)


def readings(
    vae: pvae.VAE, test: data.Split, weight: float, seed: int
) -> tuple[float, list[dict[str, float]]]:
    """The published loss by its own formula, and the networks' numbers at three scales."""
    shape = test.images.shape[1:]
    elements = shape.numel()

    def squared_error_and_loss(x: Tensor, y: Tensor | None) -> Tensor:
        q: Any = vae.encode(x)  # a normal, .to_event(1)
        t = 2 * vae.decode(q.sample()).mean - 1
        kl = closed_form.kl_normal(q.base_dist.loc, q.base_dist.scale.log())
        loss = published(2 * x - 1, t, kl, weight)
        return torch.stack([loss - weight * kl, loss], dim=1)  # (B, 2)

    def bound(x: Tensor, y: Tensor | None) -> evaluate.Bound:
        return evaluate.elbo(vae.model, vae.guide, x)

    over = partial(evaluate.over, test, batch_size=100, seed=seed)  # the same noise each time
    with evaluate.evaluating(vae):
        mse, loss = over(squared_error_and_loss).mean(0).tolist()
    rows = []
    for scale in (untempered(weight, elements), 1.0, math.sqrt(mse)):
        vae.model.likelihood.head = normal(shape, scale)
        elbo, reconstruction, kl = (term.double().mean().item() for term in over(bound))
        beta = tempered(weight, elements, scale)
        constant = elements * math.log(scale / 2 * math.sqrt(2 * math.pi))
        from_elbo = 2 * scale**2 / elements * (beta * kl - reconstruction - constant)
        rows.append(
            {"scale": scale, "beta": beta, "loss_from_elbo": from_elbo, "elbo": elbo, "kl": kl}
        )
    return loss, rows


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    study = start(args, "deep_conv", "grey")
    shape, weight = study.dataset.image_shape, args.kl_weight
    elements, images = math.prod(shape), len(study.dataset.train.images)
    scale = untempered(weight, elements)
    if not args.quiet:
        rule = f"batch size / images is {args.batch_size / images:.3g}"
        print(f"loss: w = {weight:g} ({rule}), D = {elements:,}:")
        print(f"the ELBO of a Gaussian of scale s = {scale:.3g} over images in [-1, 1]")

    vae = deep_pair(shape, args.latent_dim, args.widths, scale).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    elbo = OBJECTIVES["trace_mean_field_elbo"].elbo(1)  # its KL is analytic, as in the loss L
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), elbo)
    trainer = fit(study, vae, svi, schedule=Schedule(lr_warmup=0.05))

    loss, rows = readings(vae, study.data.test, weight, args.seed)
    numbers = {
        "kl_weight": weight,
        "published_loss": loss,
        "readings": rows,
        "seconds": study.seconds,
    }
    study.save(numbers, **pictures(trainer, study))
    cells = [
        [f"{r['scale']:.3f}", f"{r['beta']:.4g}", f"{r['loss_from_elbo']:.5f}", f"{r['elbo']:,.1f}"]
        for r in rows
    ]
    title = (
        f"{study.dataset.name} test set, {len(study.data.test.images):,} images; published "
        f"loss by its own formula {loss:.5f}, KL {rows[0]['kl']:.1f} nats per image"
    )
    header = ["scale s", "beta", "loss from the tempered ELBO", "ELBO, nats per image"]
    print(tables.columns(title, header, cells))
    print(f"{study.seconds:.0f} s; pictures and numbers: {study.folder}/")


def pictures(trainer: Trainer, study: Study) -> dict[str, plots.Figure]:
    vae, test = trainer.vae, study.data.test.images
    x = data.pixels(test[:: math.ceil(len(test) / 16)])  # spread over the test set
    with evaluate.fixed_noise(study.device, 0):
        samples = vae.sample(36)
    return {
        "reconstructions": plots.reconstructions(
            x, vae.reconstruct(x), title="Test images and their reconstructions"
        ),
        "samples": plots.samples(samples, title="Mean images at draws from the prior"),
        "curves": plots.curves(
            trainer.history,
            title="Training: the published loss as an ELBO",
            objective=trainer.objective,
        ),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser("The deep convolutional VAE, its loss read as a Gaussian ELBO.")
    parser.set_defaults(dataset="patches", num_epochs=8, batch_size=32)
    group = parser.add_argument_group("model and guide")
    cli.option(group, "--latent-dim", "latent dimension", cli.NATURAL, 128, "D")
    group.add_argument(
        "--widths",
        type=cli.NATURAL,
        nargs="+",
        default=[16, 32, 64, 128, 256],
        metavar="N",
        help="channels after each convolution; as published 32 64 128 256 512",
    )
    what = "w of the loss; the rule of the published code is batch size / training images"
    cli.option(group, "--kl-weight", what, float, 0.00025, "W")
    args = parser.parse_args(argv)
    if not 0 < args.kl_weight < math.inf:
        parser.error(
            f"--kl-weight must be above 0 and finite, not {args.kl_weight:g}: without a KL the "
            "loss is no ELBO"
        )
    return args


if __name__ == "__main__":
    cli.run_main(main)
