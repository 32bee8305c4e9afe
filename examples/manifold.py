r"""The 2-D manifold of digits: a convolutional VAE with a latent plane, as in the Keras tutorial.

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)),    z in R^2

Encoder Conv 3x3 s2 1->32, 32->64, a hidden layer of 16, then loc and log-variance; the decoder is
its mirror; ReLU, Bernoulli pixels. A latent of two units can be looked at as it is: the images
decoded over the plane, and the test images' posterior means, coloured by label.

Two units through a layer of 16 collapse easily: where the decoder draws the mean image whatever z
is, q(z|x) = p(z) is the best answer, and training stays there. So the output bias starts at the
mean image, which then need not be learned through z, and the KL's weight rises from 0.

Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114, figure 4; the Keras example
"Variational AutoEncoder" (2020).
"""

import time

import torch
from pyro.infer import SVI

import pvae
from pvae import checkpoint, cli, data, report, run
from pvae.builder import OBJECTIVES
from pvae.train import Trainer


def main() -> None:
    parser = cli.study_parser("The 2-D manifold of digits.")
    parser.set_defaults(learning_rate=6e-3)
    args = parser.parse_args()
    start = time.perf_counter()
    study = cli.start_study(args, "manifold", "dynamic")
    folder, device, dataset, observed = study

    vae = pvae.build(
        dataset.image_shape,
        latent_dim=2,
        net="conv",
        likelihood="bernoulli",
        hidden=16,
        activation="relu",
        mean_image=data.pixels(dataset.train.images).mean(0),
    )
    vae.to(device).to(memory_format=torch.channels_last)

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
        seed=args.seed,
        folder=folder,
        quiet=args.quiet,
    )
    trainer.fit()

    checkpoint.restore(vae, checkpoint.read(folder / "best.pt")["model"])
    numbers = report.results(vae, observed, seed=args.seed, quiet=args.quiet)
    numbers["seconds"] = time.perf_counter() - start
    run.write_json(folder / "results.json", numbers)
    report.pictures(vae, observed, trainer.history, folder, numbers, seed=args.seed)
    print(report.results_table(numbers, observed, dataset.name, latent_dim=2))
    print(
        f"{numbers['seconds']:.0f} s; the plane: {folder}/manifold.png, the digits on it: "
        f"{folder}/latents.png"
    )


if __name__ == "__main__":
    cli.run_main(main)
