"""Two ways to estimate the gradient of the ELBO, and the effect of a baseline on the first.

The ELBO is the expectation of f(z) = log p(x, z) - log q(z|x) over z ~ q(z|x). Its gradient by the
parameters of q is estimated from L draws z_l,

    score function (REINFORCE)   1/L sum_l (f(z_l) - b) d log q(z_l|x)
    reparameterized (SGVI)       1/L sum_l d f(z(eps_l)),    z(eps) = m(x) + s(x) eps.

Both are unbiased for every L and, since E[d log q] = 0, for every baseline b that does not depend
on the draw. Both variances fall as 1/L, but their sizes differ very much. The first estimator only
needs the value of f, so it also works for discrete z; the second needs the derivative of f by z.

In Pyro the distribution decides. If `has_rsample` is true, TraceGraph_ELBO reparameterizes; if it
is false, TraceGraph_ELBO takes the score function, with the baseline that the site's `infer` names.
The program compares each gradient with the exact one, the autograd of the closed-form ELBO of the
linear Gaussian model of examples/elbo.py. Then it trains a VAE by each estimator, from the same
start. Each VAE has a run folder inside the study's folder, which `pvae.load` and
`python -m pvae.evaluate` take.

Sources: Simple statistical gradient-following algorithms (1992), Machine Learning 8; Neural
variational inference and learning in belief networks (2014), arXiv:1402.0030; Auto-Encoding
Variational Bayes (2013), arXiv:1312.6114; Monte Carlo gradient estimation in machine learning
(2019), arXiv:1906.10652.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from elbo import linear_guide, linear_model, small_images
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pyro import poutine
from pyro.infer import SVI, TraceGraph_ELBO
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import pvae
from pvae import cli, evaluate, heads, tables
from pvae.closed_form import LinearGaussian
from pvae.nets import MLP
from pvae.objectives import OBJECTIVES
from pvae.schedule import Schedule
from pvae.study import Study, fit, start

LATENT_DIM = 8
SAMPLES = (1, 10, 100)  # L
COLOURS = {
    "score function": "#bd1f01",
    "score function, decaying average": "#ffa90e",
    "score function, neural baseline": "#832db6",
    "reparameterized": "#3f90da",
}


Options = Callable[[Tensor], Mapping[str, Any]]  # from images x to Pyro's baseline options


def no_baseline(x: Tensor) -> Mapping[str, Any]:
    """The options of the score function without a baseline."""
    return {}


def decaying_average(x: Tensor) -> Mapping[str, Any]:
    """b = the average of about the last ten costs at the same place in the batch. Pyro keeps this
    average in its store, so all batches must have the same size."""
    return {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}


def neural(net: nn.Module, particles: int) -> Options:
    """b = b(x), a network that Pyro trains together with the guide, on (f - b)^2. The ELBO is a sum
    over pixels, so the network's output is multiplied by the number of pixels."""

    def options(x: Tensor) -> Mapping[str, Any]:
        def cost(x: Tensor) -> Tensor:  # (B,), or (L, B) with several particles, like the costs
            b = x[0].numel() * net(x).squeeze(-1)
            return b if particles == 1 else b.expand(particles, -1)

        return {"nn_baseline": cost, "nn_baseline_input": x}

    return options


def with_baseline(guide: pvae.Guide, options: Options) -> Callable[[Tensor], Any]:
    """The guide's program; a handler puts Pyro's baseline options at its site z."""

    def program(x: Tensor) -> Any:
        def config(site: Any) -> Any:
            return {"baseline": dict(options(x))} if site["name"] == "z" else {}

        return poutine.infer_config(guide, config)(x)

    return program


def objective(particles: int) -> TraceGraph_ELBO:
    return TraceGraph_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)


# ---- the gradient at one guide, many times over ----


def exact_gradient(exact: LinearGaussian, guide: pvae.Guide, x: Tensor) -> Tensor:
    """The gradient of the loss, minus the closed-form ELBO summed over images, `(P,)`."""
    q = guide.posterior(x)
    elbo = exact.elbo(x, q.mean, q.stddev.diag_embed()).sum()
    return -parameters_to_vector(torch.autograd.grad(elbo, list(guide.posterior.parameters())))


def gradients(
    model: pvae.Model,
    guide: pvae.Guide,
    options: Options,
    x: Tensor,
    particles: int,
    replicates: int,
    burn_in: int = 30,
) -> Tensor:
    """Independent estimates of the loss's gradient by the guide's parameters, `(R, P)`.

    The first `burn_in` estimates, in which a running average forms, are left out. The store is a
    new one, since Pyro keeps this average there under the site's name.
    """
    elbo, program = objective(particles), with_baseline(guide, options)
    parameters: list[Any] = list(guide.posterior.parameters())
    rows = []
    with pyro.get_param_store().scope():
        for _ in range(burn_in + replicates):
            guide.zero_grad()
            elbo.loss_and_grads(model, program, x)
            rows.append(parameters_to_vector([p.grad for p in parameters]))
    return torch.stack(rows[burn_in:])


def fit_baseline(model: pvae.Model, guide: pvae.Guide, net: nn.Module, x: Tensor) -> None:
    """Trains the baseline network alone; the guide does not change."""
    adam = torch.optim.Adam(net.parameters(), lr=4e-3)
    elbo, program = objective(1), with_baseline(guide, neural(net, 1))
    for _ in range(300):
        adam.zero_grad()
        elbo.loss_and_grads(model, program, x)
        adam.step()


def total_variance(estimates: Tensor) -> float:
    """The sum of the variances of the gradient's coordinates, `(R, P)`."""
    return estimates.var(0).sum().item()


def projections(estimates: Tensor, truth: Tensor, count: int = 20) -> Tensor:
    """Errors of the mean estimate in random directions, in standard errors, `(count,)`."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(truth), count, generator=generator).to(truth)
    errors = (estimates - truth) @ directions  # (R, count)
    return errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)


def study_gradients(study: Study) -> dict[str, dict[str, list[float]]]:
    """For each estimator the variance at each L, divided by the squared norm of the exact gradient,
    and the projected errors at the first L."""
    x = small_images(study.dataset.train)
    exact = LinearGaussian.fit(x, LATENT_DIM)
    x = x[:16]
    shape = x.shape[1:]
    model = linear_model(exact, shape).double()
    reparameterized = linear_guide(heads.Normal((LATENT_DIM,)), shape).double()
    score = linear_guide(heads.ScoreFunctionNormal((LATENT_DIM,)), shape).double()
    score.load_state_dict(reparameterized.state_dict())
    truth = exact_gradient(exact, reparameterized, x)

    baseline = MLP(shape, (1,), hidden=(64,)).double()
    fit_baseline(model, score, baseline, x)
    plans: dict[str, tuple[pvae.Guide, Callable[[int], Options]]] = {
        "score function": (score, lambda _: no_baseline),
        "score function, decaying average": (score, lambda _: decaying_average),
        "score function, neural baseline": (score, lambda particles: neural(baseline, particles)),
        "reparameterized": (reparameterized, lambda _: no_baseline),
    }
    found = {}
    bar = tqdm(plans.items(), "gradients", leave=False, disable=study.args.quiet or None)
    for name, (guide, options) in bar:
        estimates = [
            gradients(model, guide, options(n), x, n, study.args.replicates).detach()
            for n in SAMPLES
        ]
        found[name] = {
            "variance": [total_variance(e) / truth.square().sum().item() for e in estimates],
            "errors": projections(estimates[0], truth).tolist(),
        }
    return found


# ---- training by each estimator ----


def train(study: Study, guide: str) -> list[float]:
    """Trains by stock SVI with one draw; the validation ELBO at the start and after each epoch."""
    args, dataset = study.args, study.dataset
    pyro.set_rng_seed(args.seed)
    vae = pvae.build(
        dataset.image_shape,
        LATENT_DIM,
        "mlp",
        guide=guide,
        hidden=200,
        mean_image=dataset.mean_image,
    ).to(study.device)
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    elbo = OBJECTIVES["trace_graph_elbo"].elbo(1)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), elbo)
    before = evaluate.over(
        study.data.validation,
        lambda x, _: evaluate.elbo(vae.model, vae.guide, x).elbo,
        batch_size=500,
        seed=args.seed,
    )
    trainer = fit(study, vae, svi, schedule=Schedule(cosine=False))
    return [before.mean().item(), *(row["validation_elbo"] for row in trainer.history)]


# ---- tables and pictures ----


def shown(found: Mapping[str, Mapping[str, list[float]]], curves: Mapping[str, list[float]]) -> str:
    gradient = tables.columns(
        "variance of the gradient, over the squared norm of the exact one; its bias in 20 random "
        "directions",
        ["estimator", *(f"L = {n}" for n in SAMPLES), "largest error / se"],
        [
            [name, *(f"{v:.3g}" for v in f["variance"]), f"{largest(f['errors']):.2f}"]
            for name, f in found.items()
        ],
    )
    training = tables.columns(
        "validation ELBO of a VAE trained with L = 1, nats per image",
        ["estimator", "before", "first epoch", "last epoch"],
        [[name, f"{c[0]:.1f}", f"{c[1]:.1f}", f"{c[-1]:.1f}"] for name, c in curves.items()],
    )
    return f"{gradient}\n{training}"


def largest(errors: Sequence[float]) -> float:
    return max(map(abs, errors))


def figure(
    found: Mapping[str, Mapping[str, list[float]]], curves: Mapping[str, list[float]]
) -> Figure:
    fig = Figure((13, 4), dpi=110, layout="constrained")
    bias, variance, training = fig.subplots(1, 3)
    bias.axhspan(-4, 4, color="0.95", zorder=0)
    for i, (name, f) in enumerate(found.items()):
        spread = torch.linspace(-0.25, 0.25, len(f["errors"])) + i
        bias.scatter(spread, f["errors"], s=9, color=COLOURS[name])
        variance.loglog(SAMPLES, f["variance"], "o-", color=COLOURS[name], label=name)
        variance.loglog(
            SAMPLES, [f["variance"][0] / n for n in SAMPLES], ":", color="0.5", linewidth=0.8
        )
    errors = [error for f in found.values() for error in f["errors"]]
    bias.set_ylim(-max(6, largest(errors) + 1), max(6, largest(errors) + 1))
    bias.set_xticks(range(len(found)), [name.replace(" ", "\n") for name in found], fontsize=7)
    bias.set_ylabel("error of the mean / its standard error")
    bias.set_title(
        f"mean gradients, L = 1: the largest of {len(errors)} errors is {largest(errors):.1f} se",
        fontsize=10,
    )
    variance.set_xlabel("draws L (dotted: 1/L)")
    variance.set_ylabel("variance / |exact gradient|$^2$")
    variance.set_title("variance of the gradient", fontsize=10)
    variance.legend(fontsize=7)
    for name, values in curves.items():
        label = f"{name}: {values[-1]:.1f}"
        training.plot(range(len(values)), values, ".-", color=COLOURS[name], label=label)
    training.set_xlabel("epoch")
    training.set_ylabel("validation ELBO, nats per image")
    training.set_title("a VAE trained with L = 1", fontsize=10)
    training.xaxis.set_major_locator(MaxNLocator(integer=True))
    training.legend(fontsize=7)
    for axes in (bias, variance, training):
        axes.grid(color="0.92", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.study_parser(
        "Score-function and reparameterized gradients of the ELBO.", resumable=True
    )
    cli.option(parser, "--replicates", "estimates of each gradient", cli.NATURAL, 200, "R")
    parser.set_defaults(learning_rate=1e-3)
    args = cli.resumed(parser, argv)
    if args.replicates < 2:
        parser.error("--replicates must be at least 2, for a variance, not 1")
    study = start(args, "gradient_estimators", "dynamic")

    found = study_gradients(study)
    guides = {
        "score function": "score_function",
        "score function, neural baseline": "score_function_baseline",
        "reparameterized": "normal",
    }
    curves = {name: train(study.part(guide), guide) for name, guide in guides.items()}
    print(shown(found, curves))
    numbers = {"gradients": found, "validation_elbo": curves, "seconds": study.seconds}
    study.save(numbers, gradient_estimators=figure(found, curves))
    print(f"{study.seconds:.0f} s; picture and numbers: {study.folder}/")


if __name__ == "__main__":
    cli.run_main(main)
