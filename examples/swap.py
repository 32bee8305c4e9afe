r"""One part swapped at a time: the same data, networks, seed and budget for each combination.

Every combination is a pair p(z) p(x|z), q(z|x) and an objective. One or two parts differ from the
first combination: Bernoulli pixels, a diagonal normal guide, the standard normal prior, the ELBO.
Whatever the training objective, the combinations are compared by the ELBO at beta = 1,

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)) = -(distortion + rate),

and by the importance-weighted bound, which is closer to log p(x) and depends less on the guide. The
figure shows distortion against rate. On each dotted line the ELBO is constant: combinations on the
same line differ only in how much information z carries.

    python examples/swap.py --combinations guide=iaf prior=vamp guide=iaf,prior=vamp objective=dreg

Each combination has its own run folder: `pvae.load`, `python -m pvae.evaluate` and `python -m
pvae.compare` take it. `--seeds 3` trains each combination three times, and reports the mean and the
standard deviation over seeds. `--resume` continues a stopped study: it trains what is missing.

Sources: Fixing a Broken ELBO (2017), arXiv:1711.00464 (rate and distortion); those of the parts are
in their docstrings.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import pyro
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from pyro.infer import SVI

import pvae
from pvae import cli, data, tables
from pvae.builder import GUIDES, LIKELIHOODS, PRIORS, choose
from pvae.objectives import OBJECTIVES
from pvae.study import DEFAULT, Study, finish, fit, start
from pvae.untrusted import read_json

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
DEFAULT_COMBINATIONS = [
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
PARTICLES = 5  # for the objectives that need several


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
            raise ValueError(f"beta must be a number of at least 0, not {value!r}")
        parts[name] = value
    return parts


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def common_observation(combinations: Iterable[Mapping[str, str]]) -> str:
    """The observation of the data for all combinations. Numbers on different data cannot be
    compared, nor numbers of a likelihood with those of a head that is not normalized."""
    chosen = [LIKELIHOODS[parts["likelihood"]] for parts in combinations]
    kinds = {likelihood.kind for likelihood in chosen}
    if len(kinds) > 1:
        raise ValueError(
            f"the likelihoods must be of one kind of data, not of {'; '.join(sorted(kinds))}: "
            "their numbers do not compare, run them apart"
        )
    # the density of grey levels that are not dequantised has no upper bound
    kind = chosen[0].data
    return "dequantized" if kind == "continuous" else data.usual_observation(kind)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    texts = args.combinations
    if all("likelihood" not in text for text in texts):
        texts = ["", *texts]
    combinations = {text or "the first": combination(text) for text in texts}
    study = start(args, "swap", common_observation(combinations.values()))

    numbers: dict[str, Any] = {}
    for number, (name, parts) in enumerate(combinations.items(), 1):
        if not args.quiet:
            print(f"\n{number} of {len(combinations)}: {name}")
        try:
            numbers[name] = pooled(
                {seed: numbers_of(parts, part) for seed, part in each_seed(study, name, parts)}
            )
        except ValueError as error:  # parts that cannot work together; the study continues
            print(f"{name} is refused: {error}")
        study.save(numbers)
    if not numbers:
        raise ValueError("none of the combinations can work; see above")

    title = f"{study.dataset.name} test set, {study.data.label}, nats per {study.data.unit}"
    title += f", mean and sd of {args.seeds} seeds" if args.seeds > 1 else ""
    if LIKELIHOODS[parts["likelihood"]].kind.endswith("not a likelihood"):
        title += "\np(x|z) is not a likelihood: compare these numbers with no other likelihood's"
    print("\n" + table(title, numbers, args.latent_dim, study.data.units))
    study.save(numbers, swap=picture(numbers, title))
    print(f"rate and distortion: {study.folder}/swap.png; a run for each in {study.folder}/")


def each_seed(study: Study, name: str, parts: Mapping[str, str]) -> Iterator[tuple[int, Study]]:
    """A study of a combination for each of its seeds, in a folder of its own."""
    first, several = study.args.seed, study.args.seeds > 1
    for seed in range(first, first + study.args.seeds):
        folder = name.replace(" ", "_") + (f",seed={seed}" if several else "")
        yield seed, study.part(folder, **parts, seed=seed)


def numbers_of(parts: Mapping[str, str], study: Study) -> dict[str, Any]:
    """The numbers in a combination's results.json; trains the combination if they are missing."""
    path = study.folder / "results.json"
    if not path.exists() or read_json(path).get("epochs") != study.args.num_epochs:
        train(parts, study)
    found = read_json(path)
    return {**found["numbers"], "seconds_per_epoch": found["seconds_per_epoch"]}


def train(parts: Mapping[str, str], study: Study) -> None:
    """Trains one combination in the folder of `study`."""
    args = study.args
    pyro.set_rng_seed(args.seed)
    vae = pvae.build(
        study.dataset.image_shape,
        args.latent_dim,
        "mlp",
        parts["likelihood"],
        parts["guide"],
        parts["prior"],
        hidden=args.hidden,
        mean_image=study.data.mean_image,
    ).to(study.device)
    objective = OBJECTIVES[parts["objective"]]
    particles = PARTICLES if objective.min_particles > 1 else 1
    adam = torch.optim.Adam(vae.parameters(), lr=args.learning_rate, fused=True)
    svi = SVI(vae.model, vae.guide, pvae.SingleOptimizer(adam), objective.elbo(particles))
    trainer = fit(study, vae, svi, schedule=DEFAULT._replace(beta=float(parts["beta"])))
    finish(study, trainer, quiet=True)


def pooled(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """For several seeds the mean and the standard deviation of each number, and the numbers of each
    seed; for one seed its numbers."""
    runs = list(by_seed.values())
    if len(runs) == 1:
        return dict(runs[0])
    seconds = mean(of["seconds_per_epoch"] for of in runs)
    rows = {key: row for key, row in runs[0].items() if isinstance(row, dict)}
    for key, row in rows.items():
        means = [of[key]["mean"] for of in runs]
        rows[key] = {**row, "mean": mean(means), "se": None, "sd": stdev(means)}
    return {**rows, "seconds_per_epoch": seconds, "seeds": dict(by_seed)}


def table(title: str, numbers: Mapping[str, Mapping[str, Any]], latent_dim: int, units: str) -> str:
    count = next(iter(numbers.values()))["iwae_100"][units]
    title += f" (IWAE-100: of {count:,} {units})"
    columns = {"elbo": "ELBO", "iwae_100": "IWAE-100", "distortion": "distortion", "rate": "rate"}
    rows = [
        [
            name,
            *(shown(of[key]) for key in columns),
            f"{of['active_units']['mean']:.3g} of {latent_dim}",
            f"{of['seconds_per_epoch']:.1f}",
        ]
        for name, of in numbers.items()
    ]
    return tables.columns(title, ["", *columns.values(), "active units", "s an epoch"], rows)


def shown(of: Mapping[str, Any]) -> str:
    spread = of.get("sd", of["se"])
    return f"{of['mean']:.2f}" if spread is None else f"{of['mean']:.2f} ± {spread:.2f}"


def picture(numbers: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Distortion against rate, with lines of equal ELBO; bars: standard deviations over seeds."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    rates, distortions, elbos = (
        [of[key]["mean"] for of in numbers.values()] for key in ("rate", "distortion", "elbo")
    )
    for i, name in enumerate(numbers):
        axes.errorbar(
            rates[i],
            distortions[i],
            xerr=numbers[name]["rate"].get("sd"),
            yerr=numbers[name]["distortion"].get("sd"),
            fmt="os^"[i // 10 % 3],
            color=colormaps["tab10"](i % 10),
            label=f"{elbos[i]:.1f}  {name}",
            zorder=3,
        )
    margin = 0.08 * (max(rates) - min(rates)) + 1
    low, high = min(rates) - margin, max(rates) + margin
    for elbo in (max(elbos) - less for less in (0, 5, 10, 20)):
        axes.plot([low, high], [-elbo - low, -elbo - high], ":", color="grey", lw=0.8, zorder=1)
        axes.annotate(f"ELBO {elbo:.0f}", (low, -elbo - low), fontsize=7, color="grey")
    axes.set(
        xlim=(low, high),
        ylim=(min(distortions) - margin, max(distortions) + margin),
        xlabel="rate, KL(q(z|x) || p(z)), nats",
        ylabel="distortion, -E_q log p(x|z), nats",
        title=title,
    )
    axes.legend(title="ELBO", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser(
        "One piece swapped at a time, on the same data, seed and budget.", resumable=True
    )
    parser.add_argument(
        "--combinations",
        nargs="+",
        default=DEFAULT_COMBINATIONS,
        metavar="PART=NAME",
        help="what differs from the first, bernoulli,normal,standard_normal,trace_elbo: several "
        "parts by commas; parts: likelihood, guide, prior, objective, beta",
    )
    cli.option(parser, "--latent-dim", "of z", cli.NATURAL, 16, "D")
    cli.option(parser, "--hidden", "hidden width", cli.NATURAL, 400, "N")
    what = "seeds that each is trained with, from --seed on; their mean and sd are told"
    cli.option(parser, "--seeds", what, cli.NATURAL, 1, "N")
    parser.set_defaults(learning_rate=2e-3)
    return cli.resumed(parser, argv)


if __name__ == "__main__":
    cli.run_main(main)
