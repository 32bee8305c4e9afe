r"""The deep convolutional "vanilla VAE" with BatchNorm, its published loss read as a Gaussian ELBO.

The published loss, on images mapped to [-1, 1] (D = C H W numbers each) and for a KL weight w, is

    L = mse(decoder(z), x) + w KL(q(z|x) || N(0, I)),      z ~ q(z|x), w = batch size / images.

For any fixed scale s of p(x|z) = N(decoder(z), s^2) it is, in nats per image,

    D / (2 s^2) L + D log(s sqrt(2 pi)) = -ELBO_beta,      beta = w D / (2 s^2),

so at s^2 = w D / 2 it is the ELBO itself, and stock SVI on that pair takes the published steps.
The table at the end reads the trained pair at this scale and at two others: the published loss is
one and the same, the ELBO (always at beta = 1) is not. Its best s is the error left in a pixel.

Sources: the "vanilla VAE" of github.com/AntixK/PyTorch-VAE (2020); Auto-Encoding Variational Bayes
(2013), arXiv:1312.6114; Simple and Effective VAE Training with Calibrated Decoders (2020),
arXiv:2006.13202. The data by default: 64x64 RGB patches of two photographs, without a network.
"""

import math
import time
from functools import partial

import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pvae
from pvae import cli, closed_form, data, evaluate, heads, plots, report, run
from pvae.nets import Affine, DeepDecoder, DeepEncoder
from pvae.priors import StandardNormal
from pvae.train import Trainer
from pvae.vae import LIKELIHOODS, OBJECTIVES


def pair(encoder: nn.Module, decoder: nn.Module, shape: tuple[int, ...], scale: float) -> pvae.VAE:
    """Networks between images in [-1, 1] as a pair for images in [0, 1]."""
    latent_dim = encoder.out_shape[0] // 2
    loc_and_log_variance = heads.Normal((latent_dim,))
    posterior = pvae.Conditional(
        nn.Sequential(Affine(2, -1), encoder), loc_and_log_variance, event_dim=3
    )
    # N(t, s^2) over 2 x - 1 is N((t + 1) / 2, (s / 2)^2) over x
    normal = heads.NormalFixedScale(shape, scale=scale / 2)
    likelihood = pvae.Conditional(nn.Sequential(decoder, Affine(0.5, 0.5)), normal, event_dim=1)
    by_hand = closed_form.ClosedForm(
        posterior.raw,
        likelihood.raw,
        closed_form.loc_log_variance,
        partial(LIKELIHOODS["gaussian"].log_likelihood, normal),
    )
    model = pvae.Model(StandardNormal(latent_dim), likelihood)
    return pvae.VAE(model, pvae.Guide(posterior), by_hand)


def published_loss(vae: pvae.VAE, x: Tensor, weight: float) -> Tensor:
    """mse + w KL of each image, at one draw of z."""
    loc, log_scale = closed_form.loc_log_variance(vae.guide.posterior.raw(x))
    mean = vae.decode(vae.encode(x).sample()).mean
    kl = closed_form.kl_normal(loc, log_scale)
    return closed_form.mse_and_kl(2 * x - 1, 2 * mean - 1, kl, weight)


def main() -> None:
    parser = cli.study_parser(__doc__.splitlines()[0])
    parser.set_defaults(dataset="patches", num_epochs=12, batch_size=64)
    group = parser.add_argument_group("model and guide")
    group.add_argument("--latent-dim", type=int, default=128, metavar="D", help="latent dimension")
    group.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 256],
        metavar="N",
        help="channels after each convolution; 32 64 128 256 512 as published",
    )
    group.add_argument(
        "--kl-weight", type=float, metavar="W", help="w (default: batch size / training images)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    study = cli.start_study(args, "deep_conv", "grey")
    shape, images = study.dataset.image_shape, len(study.dataset.train.images)
    elements = math.prod(shape)
    weight = args.kl_weight or args.batch_size / images
    scale = closed_form.mse_scale(weight, elements)
    if not args.quiet:
        print(f"w = {weight:.3g} and D = {elements:,}: the ELBO of a Gaussian of scale {scale:.3g}")

    encoder = DeepEncoder(shape, (2 * args.latent_dim,), args.widths)
    decoder = nn.Sequential(DeepDecoder((args.latent_dim,), shape, args.widths), nn.Tanh())
    vae = pair(encoder, decoder, shape, scale).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    objective = OBJECTIVES["trace_mean_field_elbo"]
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

    def over_test(function):
        return evaluate.over(study.observed.test, function, batch_size=100, seed=args.seed)

    # the same networks read at three scales, at the same noise
    with evaluate.evaluating(vae):
        loss = over_test(lambda x, y: published_loss(vae, x, weight)).mean().item()
    rows = []
    for s in (scale, 1.0, 0.1):
        p = pair(encoder, decoder, shape, s).to(study.device)
        bound = over_test(lambda x, y: evaluate.elbo(p.model, p.guide, x))
        print(s, bound.elbo.mean())
    print(loss)
    x = data.pixels(study.observed.test.images)
    x = x[:: math.ceil(len(x) / 16)]
    plots.save(plots.reconstructions(x, vae.reconstruct(x)), study.folder / "reconstructions.png")
    plots.save(plots.samples(vae.sample(36)), study.folder / "samples.png")
    plots.save(plots.curves(trainer.history), study.folder / "curves.png")


if __name__ == "__main__":
    cli.run_main(main)
