r"""One piece swapped at a time: the same data, networks, seed and budget for each combination.

Every combination is a pair p(z) p(x|z), q(z|x) and an objective, of which one part or two differ
from the first one: Bernoulli pixels, a diagonal normal guide, the standard normal prior, the ELBO.
They are compared by what they reach, always at beta = 1 and whatever they were trained by:

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)) = -(distortion + rate),

and by the importance-weighted bound, which is closer to log p(x) and does not blame the model for
its guide. The figure sets distortion against rate: on each dotted line the ELBO is one and the
same, so combinations there differ only in how much they say by z.

    python examples/swap.py --combinations guide=iaf prior=vamp guide=iaf,prior=vamp objective=dreg

Sources: Fixing a Broken ELBO (2017), arXiv:1711.00464 (rate and distortion); the parts name theirs.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import pyro
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from pyro.infer import SVI

import pvae
from pvae import checkpoint, cli, plots, report, run
from pvae.builder import GUIDES, LIKELIHOODS, OBJECTIVES, PRIORS, choose
from pvae.train import Trainer

BASE = {
    "likelihood": "bernoulli",
    "guide": "normal",
    "prior": "standard_normal",
    "objective": "trace_elbo",
    "beta": "1",
}
TABLES: Mapping[str, Mapping[str, object]] = {
    "likelihood": LIKELIHOODS,
    "guide": GUIDES,
    "prior": PRIORS,
    "objective": OBJECTIVES,
}
DEFAULT = [
    "",
    "objective=trace_mean_field_elbo",
    "guide=full_covariance",
    "guide=mixture",
    "guide=iaf",
    "prior=mixture",
    "prior=vamp",
    "prior=flow",
    "guide=full_covariance,prior=vamp",
    "objective=iwae",
    "objective=dreg",
    "objective=free_bits",
    "objective=info_vae",
    "beta=0.5",
    "beta=2",
]
OBSERVE = {"binary": "dynamic", "levels": "grey", "grey": "dequantized"}
PARTICLES = 5  # of the objectives that need several


def combination(text: str) -> dict[str, str]:
    """`guide=iaf,prior=vamp`: the parts that differ from the first combination."""
    parts = dict(BASE)
    for change in filter(None, text.split(",")):
        name, _, value = change.partition("=")
        if name not in BASE:
            raise ValueError(f"{change!r}: a combination is NAME=VALUE of {', '.join(BASE)}")
        if name in TABLES:
            choose(name, value, TABLES[name])
        elif not _is_weight(value):
            raise ValueError(f"{change}: beta is a number of at least 0")
        parts[name] = value
    return parts


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def common_data(combinations: Sequence[Mapping[str, str]]) -> str:
    """What all the likelihoods are of; numbers on different data are not to be compared."""
    kinds = {LIKELIHOODS[parts["likelihood"]].data for parts in combinations}
    if len(kinds) > 1:
        raise ValueError(
            f"the likelihoods are of different data ({', '.join(sorted(kinds))}), whose numbers do "
            "not compare: run them apart"
        )
    return OBSERVE[kinds.pop()]


def main() -> None:
    parser = cli.study_parser("One piece swapped at a time, on the same data, seed and budget.")
    parser.add_argument(
        "--combinations",
        nargs="+",
        default=DEFAULT[1:],
        metavar="PART=NAME",
        help="what differs from the first, bernoulli,normal,standard_normal,trace_elbo: several "
        "parts by commas; parts: likelihood, guide, prior, objective, beta",
    )
    parser.add_argument("--latent-dim", type=cli.NATURAL, default=16, metavar="D", help="latent")
    parser.add_argument("--hidden", type=cli.NATURAL, default=400, metavar="N", help="hidden width")
    parser.set_defaults(learning_rate=2e-3)
    args = parser.parse_args()
    texts = args.combinations
    if all("likelihood" not in text for text in texts):
        texts = ["", *texts]
    combinations = {text or "the first": combination(text) for text in texts}
    study = cli.start_study(args, "swap", common_data(list(combinations.values())))

    numbers: dict[str, dict[str, float]] = {}
    for number, (name, parts) in enumerate(combinations.items()):
        if not args.quiet:
            print(f"\n{number + 1} of {len(combinations)}: {name}")
        try:
            numbers[name] = train(parts, study, args, study.folder / f"{number:02d}")
        except ValueError as error:  # what cannot work together says so; the others go on
            print(f"{name} is refused: {error}")
        run.write_json(study.folder / "results.json", numbers)
    if not numbers:
        raise ValueError("none of the combinations can work; see above")

    title = f"{study.dataset.name} test set, {study.observed.how}, nats per image (IWAE-500: 1,000)"
    print("\n" + table(title, numbers, args.latent_dim))
    plots.save(picture(numbers, title), study.folder / "swap.png")
    print(f"rate and distortion: {study.folder}/swap.png; a run for each in {study.folder}/")


def train(
    parts: Mapping[str, str], study: cli.Study, args: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """Trains one combination and returns its numbers; the run is kept in `folder`."""
    _, device, dataset, observed = study
    pyro.set_rng_seed(args.seed)
    vae = pvae.build(
        dataset.image_shape,
        args.latent_dim,
        "mlp",
        parts["likelihood"],
        parts["guide"],
        parts["prior"],
        hidden=args.hidden,
        mean_image=dataset.mean_image,
    ).to(device)
    objective = OBJECTIVES[parts["objective"]]
    particles = PARTICLES if objective.min_particles > 1 else 1
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(particles))
    folder.mkdir()
    trainer = Trainer(
        vae,
        svi,
        objective,
        observed,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        beta=float(parts["beta"]),
        kl_warmup=0.05,
        lr_warmup=0.05,
        seed=args.seed,
        folder=folder,
        quiet=args.quiet,
    )
    start = time.perf_counter()
    trainer.fit()
    checkpoint.restore(vae, checkpoint.read(folder / "best.pt")["model"])
    numbers = report.results(vae, observed, seed=args.seed, quiet=args.quiet)
    numbers["seconds_per_epoch"] = median(row["seconds"] for row in trainer.history)
    numbers["seconds"] = time.perf_counter() - start
    return numbers


def table(title: str, numbers: Mapping[str, Mapping[str, float]], latent_dim: int) -> str:
    header = ["", "ELBO", "IWAE-500", "distortion", "rate (KL)", "active units", "s an epoch"]
    rows = [
        [
            name,
            f"{n['test_elbo']:.2f}",
            f"{n['iwae_500']:.2f} ± {n['iwae_500_se']:.2f}",
            f"{-n['test_reconstruction']:.2f}",
            f"{n['test_kl']:.2f}",
            f"{n['active_units']} of {latent_dim}",
            f"{n['seconds_per_epoch']:.1f}",
        ]
        for name, n in numbers.items()
    ]
    return report.columns(title, header, rows)


def picture(numbers: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Distortion against rate, with lines of one ELBO."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    rates = [n["test_kl"] for n in numbers.values()]
    distortions = [-n["test_reconstruction"] for n in numbers.values()]
    best = max(n["test_elbo"] for n in numbers.values())
    for i, (name, n) in enumerate(numbers.items()):
        axes.scatter(
            rates[i],
            distortions[i],
            s=45,
            color=colormaps["tab10"](i % 10),
            marker="os^"[i // 10 % 3],
            label=f"{n['test_elbo']:.1f}  {name}",
            zorder=3,
        )
    margin = 0.08 * (max(rates) - min(rates)) + 1
    low, high = min(rates) - margin, max(rates) + margin
    top = max(distortions) + margin
    for elbo in (best, best - 5, best - 10, best - 20):
        axes.plot([low, high], [-elbo - low, -elbo - high], ":", color="grey", lw=0.8, zorder=1)
        axes.annotate(f"ELBO {elbo:.0f}", (low, -elbo - low), fontsize=7, color="grey")
    axes.set(
        xlim=(low, high),
        ylim=(min(distortions) - margin, top),
        xlabel="rate, KL(q(z|x) || p(z)), nats per image",
        ylabel="distortion, -E_q log p(x|z), nats per image",
        title=title,
    )
    axes.legend(title="ELBO", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    cli.run_main(main)
