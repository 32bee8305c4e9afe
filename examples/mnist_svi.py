"""A convolutional VAE on MNIST, as two Pyro programs trained by stock SVI.

The generative model is p(z) p(x|z), the amortized guide is q(z|x), and SVI maximizes

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z))  <=  log p(x).

After every epoch SVI's loss is compared with the same loss written by hand, without Pyro.
Without arguments it trains 10 epochs on MNIST; the folder of the run is in runs/.
"""

from collections.abc import Sequence

import torch

import pvae
from pvae import cli, report
from pvae.objectives import OBJECTIVES
from pvae.study import engine, finish, fit, start


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(cli.parser("A convolutional VAE on MNIST, by Pyro SVI."), argv)
    study = start(args, "mnist_svi")

    # the pair of programs: p(z) p(x|z) and q(z|x)
    vae = pvae.build(
        study.dataset.image_shape,
        args.latent_dims,
        args.net,
        args.likelihood,
        args.guide,
        args.prior,
        hidden=args.hidden,
        activation=args.activation,
        num_classes=study.dataset.num_classes if args.conditional else None,
        components=args.components,
        dropout=args.dropout,
        mean_image=study.data.mean_image,
    )
    vae.to(study.device).to(memory_format=torch.channels_last)

    # pyro.infer.SVI and Trace_ELBO, unless --engine and --objective say otherwise
    SVI, objective = engine(study), OBJECTIVES[args.objective]
    groups = pvae.optim.decay_groups(vae, args.weight_decay)
    adam = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    # one optimizer for all parameters
    optimizer = pvae.SingleOptimizer(adam, clip_norm=args.clip_norm, on_nan=args.on_nan)
    svi = SVI(vae.model, vae.guide, optimizer, objective.elbo(args.num_particles))

    trainer = fit(
        study,
        vae,
        svi,
        schedule=cli.schedule(args),
        on_epoch=report.progress(study.data, study.folder, args.num_epochs),
    )
    finish(study, trainer)


if __name__ == "__main__":
    cli.run_main(main)
