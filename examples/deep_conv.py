r"""The deep convolutional "vanilla VAE" with BatchNorm, its published loss read as a Gaussian ELBO.

The published loss, on images mapped to [-1, 1] (D = C H W numbers each) and for a KL weight w, is

    L = mse(decoder(z), x) + w KL(q(z|x) || N(0, I)),      z ~ q(z|x).

For any fixed scale s of p(x|z) = N(decoder(z), s^2) it is, in nats per image,

    D / (2 s^2) L + D log(s sqrt(2 pi)) = -ELBO_beta,      beta = w D / (2 s^2),

so at s^2 = w D / 2 it is the ELBO itself, and stock SVI on that pair takes the published steps.
The table at the end reads the trained networks at three scales, this one, 1 and the error that they
leave in a pixel: the published loss is one and the same, the ELBO (always at beta = 1) is not.
Its nats are of images in [0, 1], as in every other example: D log 2 above those of [-1, 1].

w = batch size / images in the data set is about 0.0006 for batches of 128 of 200,000 images, but
more than ten times that for the patches here, which drowns the images: the default is 0.00025.

Sources: the "vanilla VAE" of github.com/AntixK/PyTorch-VAE (2020); Auto-Encoding Variational Bayes
(2013), arXiv:1312.6114; Simple and Effective VAE Training with Calibrated Decoders (2020),
arXiv:2006.13202. The data by default: 64x64 RGB patches of two photographs, without a network.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pvae
from pvae import cli, closed_form, data, evaluate, heads, plots, report, run
from pvae.builder import LIKELIHOODS, OBJECTIVES
from pvae.nets import Affine, DeepDecoder, DeepEncoder
from pvae.priors import StandardNormal
from pvae.train import Trainer


def normal(shape: Sequence[int], scale: float) -> heads.NormalFixedScale:
    """N(t, s^2) over images 2 x - 1 in [-1, 1] is N((t + 1) / 2, (s / 2)^2) over x in [0, 1]."""
    return heads.NormalFixedScale(shape, scale=scale / 2)


def deep_pair(
    shape: Sequence[int], latent_dim: int, widths: Sequence[int], scale: float
) -> pvae.VAE:
    """The published networks, which work in [-1, 1], as a pair for images in [0, 1]."""
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
    """The published loss by its own formula, and what the networks are at three scales."""
    shape = test.images.shape[1:]
    elements = shape.numel()

    def squared_error_and_loss(x: Tensor, y: Tensor | None) -> Tensor:
        q = vae.encode(x)
        t = 2 * vae.decode(q.sample()).mean - 1
        kl = closed_form.kl_normal(q.base_dist.loc, q.base_dist.scale.log())
        loss = closed_form.mse_and_kl(2 * x - 1, t, kl, weight)
        return torch.stack([loss - weight * kl, loss], dim=1)  # (B, 2)

    def bound(x: Tensor, y: Tensor | None) -> evaluate.Bound:
        return evaluate.elbo(vae.model, vae.guide, x)

    over = partial(evaluate.over, test, batch_size=100, seed=seed)  # the same noise each time
    with evaluate.evaluating(vae):
        mse, loss = over(squared_error_and_loss).mean(0).tolist()
    rows = []
    for scale in (closed_form.mse_scale(weight, elements), 1.0, math.sqrt(mse)):
        vae.model.likelihood.head = normal(shape, scale)
        elbo, reconstruction, kl = (term.double().mean().item() for term in over(bound))
        beta = closed_form.mse_beta(weight, elements, scale)
        constant = elements * math.log(scale / 2 * math.sqrt(2 * math.pi))
        from_elbo = 2 * scale**2 / elements * (beta * kl - reconstruction - constant)
        rows.append(
            {"scale": scale, "beta": beta, "loss_from_elbo": from_elbo, "elbo": elbo, "kl": kl}
        )
    return loss, rows


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    study = cli.start_study(args, "deep_conv", "grey")
    shape, images = study.dataset.image_shape, len(study.dataset.train.images)
    elements = math.prod(shape)
    weight, by_rule = args.kl_weight, args.batch_size / images
    scale = closed_form.mse_scale(weight, elements)
    if not args.quiet:
        print(f"loss: w = {weight:g} (batch size / images is {by_rule:.3g}), D = {elements:,}:")
        print(f"the ELBO of a Gaussian of scale s = {scale:.3g} over images in [-1, 1]")

    vae = deep_pair(shape, args.latent_dim, args.widths, scale).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    objective = OBJECTIVES["trace_mean_field_elbo"]  # its KL is analytic, as in the loss
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(1))
    trainer = Trainer(
        vae,
        svi,
        objective,
        study.observed,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        lr_warmup=0.05,
        seed=args.seed,
        quiet=args.quiet,
    )
    trainer.fit()

    loss, rows = readings(vae, study.observed.test, weight, args.seed)
    numbers = {
        "kl_weight": weight,
        "published_loss": loss,
        "readings": rows,
        "seconds": time.perf_counter() - start,
    }
    run.write_json(study.folder / "results.json", numbers)
    pictures(vae, study, trainer.history)
    cells = [
        [f"{r['scale']:.3f}", f"{r['beta']:.4g}", f"{r['loss_from_elbo']:.5f}", f"{r['elbo']:,.1f}"]
        for r in rows
    ]
    title = (
        f"{study.dataset.name} test set, {len(study.observed.test.images):,} images; published "
        f"loss by its own formula {loss:.5f}, KL {rows[0]['kl']:.1f} nats per image"
    )
    header = ["scale s", "beta", "loss from the tempered ELBO", "ELBO, nats per image"]
    print(report.columns(title, header, cells))
    print(f"{numbers['seconds']:.0f} s; pictures and numbers: {study.folder}/")


def pictures(vae: pvae.VAE, study: cli.Study, history: Sequence[Mapping[str, float]]) -> None:
    test = study.observed.test.images
    x = data.pixels(test[:: math.ceil(len(test) / 16)])  # from all over the test set
    with evaluate.fixed_noise(study.device, 0):
        samples = vae.sample(36)
    figures = {
        "reconstructions": plots.reconstructions(
            x, vae.reconstruct(x), title="Test images and their reconstructions"
        ),
        "samples": plots.samples(samples, title="Mean images at draws from the prior"),
        "curves": plots.curves(history, title="Training: the published loss, in nats"),
    }
    for name, figure in figures.items():
        plots.save(figure, study.folder / f"{name}.png")


def arguments() -> argparse.Namespace:
    parser = cli.study_parser(__doc__.splitlines()[0])
    parser.set_defaults(dataset="patches", num_epochs=8, batch_size=32)
    group = parser.add_argument_group("model and guide")
    group.add_argument("--latent-dim", type=int, default=128, metavar="D", help="latent dimension")
    group.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 256],
        metavar="N",
        help="channels after each convolution; as published 32 64 128 256 512",
    )
    group.add_argument(
        "--kl-weight",
        type=float,
        default=0.00025,
        metavar="W",
        help="w of the loss; the rule of the published code is batch size / training images",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run_main(main)
