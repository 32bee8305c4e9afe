r"""Why a Gaussian prior is enough: a function can turn it into the distribution of the data.

With z ~ N(0, I) in the plane, g(z) = z / 10 + z / ||z|| is a point of a ring. The decoder does not
know g: in the VAE p(z) N(x; f(z), s^2 I) the small network f learns such a function from points of
the ring. The best possible result is known exactly here, because the ring has a density. With
r = ||z||, the radius is R = 1 + r / 10, and the angle is uniform, so

    p(x) = p_r(10 (R - 1)) * 10 / (2 pi R),    p_r(r) = r exp(-r^2 / 2),

and no model's mean log density exceeds E log p(x); it is below by KL(p || model). The ELBO is still
lower, as z given x is far from Gaussian: f must tear the plane at 0. The importance-weighted bound
suffers less from this, and training by it gives a sharper ring.

Source: Tutorial on Variational Autoencoders (2016), arXiv:1606.05908, figure 2.
"""

import math
from argparse import Namespace
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

import pvae
from pvae import VAE, Conditional, Guide, Model, cli, evaluate, plots, run, tables
from pvae.heads import Normal, NormalSharedScale
from pvae.nets import MLP
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal
from pvae.study import find_device, num_epochs


def g(z: Tensor) -> Tensor:
    """Maps the plane onto a ring, `(*, 2) -> (*, 2)`."""
    return z / 10 + z / z.norm(dim=-1, keepdim=True)


def ring_log_density(x: Tensor) -> Tensor:
    """log p(x) of x = g(z), z ~ N(0, I), `(*, 2) -> (*,)`, in nats; -inf within the ring."""
    radius = x.norm(dim=-1)
    r = 10 * (radius - 1).clamp(min=0)
    return r.log() - r**2 / 2 + math.log(10 / (2 * math.pi)) - radius.log()


def ring_vae(hidden: int = 64) -> VAE:
    """p(z) N(x; f(z), s^2 I) and q(z|x) with two small networks; z and x are in the plane."""
    posterior, likelihood = Normal((2,)), NormalSharedScale((2,), scale=0.3, min_scale=0.001)
    encoder = MLP((2,), posterior.param_shape, (hidden, hidden))
    decoder = MLP((2,), likelihood.param_shape, (hidden, hidden))
    return VAE(
        Model(StandardNormal(2), Conditional(decoder, likelihood, event_dim=1)),
        Guide(Conditional(encoder, posterior, event_dim=1)),
    )


def trained(args: Namespace, x: Tensor, name: str, elbo: ELBO) -> VAE:
    """A pair trained by stock SVI; each step takes points drawn from `x` `(N, 2)`."""
    vae = ring_vae().to(x.device)
    steps = num_epochs(args, len(x)) * math.ceil(len(x) / args.batch_size)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate)
    schedule = CosineAnnealingLR(adam, steps)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), elbo)
    for _ in trange(steps, desc=name, leave=False, disable=args.quiet or None):
        svi.step(x[torch.randint(len(x), (args.batch_size,), device=x.device)])
        schedule.step()
    return vae


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser("A Gaussian prior, pushed onto a ring.", images=False)
    args = parser.parse_args(argv)
    pyro.set_rng_seed(args.seed)
    device = find_device(args.device)
    folder = run.new_folder(args.out, "gaussian_prior")
    config = {"arguments": vars(args), "seed": args.seed, "versions": run.versions()}
    run.write_json(folder / "config.json", config)

    x, held_out = g(torch.randn(17_000, 2, device=device)).split([15_000, 2_000])
    gaussian = dist.MultivariateNormal(x.mean(0), x.T.cov())
    log_density = {"a Gaussian fitted to the ring": gaussian.log_prob(held_out)}
    # the ELBO also pulls the posterior to a Gaussian, the importance-weighted bound much less
    vaes = {}
    elbos = {"ELBO": Trace_ELBO(max_plate_nesting=1), "IWAE-8": OBJECTIVES["iwae"].elbo(8)}
    for name, elbo in elbos.items():
        vaes[name] = trained(args, x, name, elbo)
        # a bound on the mean log density of points that no model was trained on
        with evaluate.fixed_noise(device, args.seed):
            log_density[f"VAE by the {name}, IWAE-500 bound"] = evaluate.importance_weighted(
                vaes[name].model, vaes[name].guide, held_out, num_samples=500
            )
    log_density["the ring's own density"] = ring_log_density(held_out)

    estimates = {name: evaluate.estimate(values) for name, values in log_density.items()}
    run.write_json(folder / "results.json", {name: e._asdict() for name, e in estimates.items()})
    plots.save(drawn(vaes, torch.randn(3000, 2, device=device)), folder / "ring.png")
    print(
        tables.columns(
            f"log p(x), {len(held_out):,} points not trained on, nats per point",
            ["", "mean", "standard error"],
            [[name, f"{e.mean:.3f}", f"{e.se:.3f}"] for name, e in estimates.items()],
        )
    )
    print(f"picture and numbers: {folder}/")


@torch.no_grad()
def drawn(vaes: dict[str, VAE], z: Tensor) -> Figure:
    """The same points, coloured by the angle of z: z, g(z), and what each VAE has learned."""
    panels = {"z ~ N(0, I)": z, "x = g(z) = z / 10 + z / ||z||": g(z)}
    for name, vae in vaes.items():
        p = vae.decode(z)
        panels[f"f(z), learned by the {name}\nnoise {p.stddev[0, 0]:.3f}"] = p.mean
    figure = Figure((12, 3.6), dpi=120, layout="constrained")
    angle = torch.atan2(z[:, 1], z[:, 0]).cpu().numpy()
    for axes, (title, points) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        across, up = points.cpu().numpy().T
        # without smooth edges the file is half as large
        axes.scatter(across, up, c=angle, cmap="hsv", s=3, linewidths=0, antialiased=False)
        axes.set_title(title, fontsize=10)
        name, limit = ("z", 4) if points is z else ("x", 1.5)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set(xlabel=f"{name}1", ylabel=f"{name}2")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    cli.run_main(main)
