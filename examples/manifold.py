r"""The 2-D manifold of digits: a convolutional VAE with a latent plane, as in the Keras tutorial.

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)),    z in R^2

Encoder Conv 3x3 s2 1->32, 32->64, a hidden layer of 16, then loc and log-variance; the decoder is
its mirror; Bernoulli pixels. A latent of two units can be drawn directly: the images decoded over
the plane, and the test images' posterior means, coloured by label.

The tutorial has ReLU; here it is SiLU, because a layer of 16 ReLUs dies at once. At the start a
unit's input differs by about 0.02 from image to image, and one step of Adam at a rate of 1e-3 moves
it by about 0.1 for all images together. After 5 steps 13 of 16 units were 0 for every image, where
they have no gradient. After 200 steps 2 of 4 seeds with ReLU were collapsed, at a KL of 0.1 and
0.2; with SiLU no unit died, and 10 of 10 seeds used both latent units after at most 1,000 steps, on
MNIST and on the digits. The output bias starts at the mean image, so that z need not encode this
image. Four epochs of MNIST (`-n 4`) reach a test ELBO of -150.7, KL 6.0; the digits reach -282.8,
KL 6.1.

Sources: Auto-Encoding Variational Bayes (2013), arXiv:1312.6114, figure 4; the Keras example
"Variational AutoEncoder" (2020).
"""

from collections.abc import Sequence

import torch
from pyro.infer import SVI, Trace_ELBO

import pvae
from pvae import cli
from pvae.schedule import Schedule
from pvae.study import finish, fit, start


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("The 2-D manifold of digits.")
    parser.set_defaults(batch_size=64)
    study = start(parser.parse_args(argv), "manifold", "dynamic")
    vae = pvae.build(
        study.dataset.image_shape,
        latent_dim=2,
        net="conv",
        likelihood="bernoulli",
        hidden=16,
        activation="silu",
        mean_image=study.dataset.mean_image,
    )
    vae.to(study.device).to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(vae.parameters(), lr=study.args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), Trace_ELBO())
    finish(study, fit(study, vae, svi, schedule=Schedule(lr_warmup=0.05)))
    where = study.folder
    print(f"the plane: {where}/manifold.png, the digits on it: {where}/latents.png")


if __name__ == "__main__":
    cli.run_main(main)
