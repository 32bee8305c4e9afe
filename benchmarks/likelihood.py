"""Rows of published tables, and the numbers that this package reaches: one command for each row.

    python benchmarks/likelihood.py 1                # trains, evaluates, writes results.json
    python benchmarks/likelihood.py --resume RUN     # continues a stopped run
    python benchmarks/likelihood.py table FILE ...   # prints the table of such results.json

The protocol is that of the papers. 50,000 images train, binarised anew for every batch; 10,000
validate; the model is the one of the best validation ELBO. The binary test images are those of
NumPy's seed 777, and the test set is touched once. `log p(x)` is estimated by importance sampling
on all 10,000 test images.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pvae
from pvae import captured, checkpoint, cli, evaluate, evaluation, heads, nets, results, run
from pvae.data import Split
from pvae.evaluate import estimate
from pvae.flows import CouplingPrior
from pvae.objectives import OBJECTIVES
from pvae.priors import StandardNormal
from pvae.results import Subject
from pvae.schedule import Schedule
from pvae.study import Study, engine, fit, start
from pvae.train import Trainer
from pvae.untrusted import read_json

CHECKED = 1000  # test images whose log p(x) is estimated once more, by ten times the draws
VALIDATED = 400  # validation images whose log p(x) is printed after each stage, to compare recipes
PART = 1000  # test images whose log p(x) is kept together, so that an evaluation can go on
LATENT = 40  # dimensions of the lowest latent layer
UPPER = 16  # dimensions of the layer above it, of row 5
CLIP = 1000.0  # norm of a batch's gradient, beyond what a run shows after its first steps
# annealed importance sampling, which estimates log p(x) of a few images by another method
ANNEALED = {"annealed_images": 50, "temperatures": 200, "chains": 1, "from_prior": False}
PROPOSALS = {"num_samples": 5000, "proposal_steps": 600}


class Stage(NamedTuple):
    """One fit of a row's pair.

    change: puts a new part into the pair before the fit.
    trains: returns the part of the pair that is trained; the rest is held fixed. Where it is the
        guide, only the bound gets tighter.
    dropout: the share of the encoder's input that is left out, for pairs that have dropout; without
        it a guide fits closer, and overfits sooner.
    chosen: the pair is that of the best validation ELBO; else that after the last epoch, because an
        importance-weighted bound needs a wider guide than the ELBO does.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 128
    objective: str = "trace_elbo"
    particles: int = 1
    weight_decay: float = 0.01
    ema: float | None = 0.999
    kl_warmup: float | Sequence[float] = 0.0
    change: Callable[[pvae.VAE], None] | None = None
    trains: Callable[[pvae.VAE], nn.Module] = lambda vae: vae
    dropout: float = 0.1
    chosen: bool = True


class Row(NamedTuple):
    """A row of the table.

    title: the data and the pair, in words.
    dataset, observe: the data and how they are observed, by their names in `pvae.data`.
    pair: makes the pair from the mean image.
    stages: the fits of the pair by name; each fit starts from the result of the one before.
    published: the numbers of the papers.
    must: the bar: the number of this row must be above it.
    number: the key of that number in results.json, "log_evidence" or "elbo"; higher is better.
    all_train: the validation images train too, as in sources that do not validate.
    """

    title: str
    dataset: str
    observe: str
    pair: Callable[[Tensor], pvae.VAE]
    stages: Mapping[str, Stage]
    published: Mapping[str, float]
    must: float
    number: str = "log_evidence"
    all_train: bool = False


def residual(mean_image: Tensor) -> pvae.VAE:
    """Residual networks of 32 channels at 14x14 and 64 at 7x7, with one block at each size.

    Dropout of the encoder's input reduces overfitting; each stage sets its rate.
    """
    shape = tuple(mean_image.shape)
    likelihood, posterior = heads.Bernoulli(shape), heads.Normal((LATENT,))
    sizes: Any = {"widths": (32, 32, 64), "depths": (0, 1, 1), "hidden": 256, "groups": None}
    encoder: nn.Module = nets.ResNetEncoder(shape, posterior.param_shape, **sizes)
    decoder = nets.ResNetDecoder((LATENT,), shape, **sizes)
    decoder.set_output_bias(likelihood.raw_mean(mean_image))
    model = pvae.Model(StandardNormal(LATENT), pvae.Conditional(decoder, likelihood, event_dim=1))
    encoder = nn.Sequential(nn.Dropout(), encoder)
    return pvae.VAE(model, pvae.Guide(pvae.Conditional(encoder, posterior, event_dim=3)))


def named(**parts: Any) -> Callable[[Tensor], pvae.VAE]:
    """A function that builds a pair by `pvae.build`, from the names of its parts (`parts`)."""
    return lambda mean_image: pvae.build(tuple(mean_image.shape), mean_image=mean_image, **parts)


def with_flow(vae: pvae.VAE) -> None:
    """The prior becomes a coupling flow (RealNVP), which starts at N(0, I)."""
    vae.model.prior = CouplingPrior(LATENT, transforms=8, hidden=(128,))


def with_layer(vae: pvae.VAE) -> None:
    """The prior becomes `p(z2) p(z1 | z2)`, z2 of 16, of which the second starts at N(0, I).

    The guide becomes `q(z1 | x) q(z2 | z1)`, whose `q(z1 | x)` is that of before.
    """

    def between(given: int, latent: int) -> tuple[nets.MLP, pvae.Conditional]:
        head = heads.Normal((latent,))
        net = nets.MLP((given,), head.param_shape, hidden=(512, 512))
        return net, pvae.Conditional(net, head, event_dim=1)

    (net, prior), (_, top) = between(UPPER, LATENT), between(LATENT, UPPER)
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)
    vae.model = pvae.HierarchicalModel(StandardNormal(UPPER), prior, vae.model.likelihood)
    vae.guide = pvae.HierarchicalGuide(vae.guide.posterior, top)


def upper_layer(vae: pvae.VAE) -> nn.Module:
    """`p(z1 | z2)` and `q(z2 | z1)`."""
    return nn.ModuleList([vae.model.prior, vae.guide.top])


# the whole pair is trained further by an importance-weighted bound, which lets its guide be wider
_DREG = Stage(8, 5e-4, batch_size=64, objective="dreg", particles=8, chosen=False)
_IWAE = _DREG._replace(epochs=1, particles=50)
# or only its guide: draws from a wider guide are better for importance sampling
_GUIDE = _DREG._replace(epochs=2, trains=lambda vae: vae.guide, dropout=0.0)
_FLOW = Stage(8, 1e-3, change=with_flow)
# at the start z2 has no effect; if its KL had the full weight from then on, it would stay unused
_LAYER = Stage(12, 2e-3, change=with_layer, trains=upper_layer, kl_warmup=(0.0, 0.5))
_TWO_LAYERS = {"HVAE, VampPrior (arXiv:1705.07120)": -81.24, "exemplar, conv": -79.67}
_ONE = Row(
    title="dynamic MNIST, one layer of 40, N(0, I)",
    dataset="mnist",
    observe="dynamic",
    pair=residual,
    stages={"pair": Stage(48, 2e-3, kl_warmup=0.05), "guide": _GUIDE},
    published={"MLP, z = 50 (arXiv:1509.00519)": -86.76, "gated (arXiv:2004.04795)": -84.45},
    must=-83.0,
)
_FASHION = _ONE._replace(
    title="dynamic Fashion-MNIST, one layer of 40, N(0, I)",
    dataset="fashion-mnist",
    stages={"pair": Stage(30, 2e-3, kl_warmup=0.05), "dreg": _DREG, "iwae": _IWAE},
    published={"gated (arXiv:2004.04795)": -228.70},
    must=-228.0,
)
ROWS: Mapping[str, Row] = {
    "1": _ONE,
    "2": _ONE._replace(
        title="row 1 by IWAE, k = 50",
        stages={
            "pair": _ONE.stages["pair"],
            "dreg": _DREG._replace(epochs=3),
            "iwae": _IWAE,
        },
        published={"IWAE (arXiv:1509.00519)": -84.78, "DReG (arXiv:1810.04152)": -84.32},
        must=-82.5,
    ),
    "3": _ONE._replace(
        title="row 1 with a flow as prior",
        stages={
            "pair": _ONE.stages["pair"],
            "flow": _FLOW,
            "dreg": _DREG._replace(epochs=3),
            "iwae": _IWAE,
        },
        published={"VampPrior (arXiv:1705.07120)": -82.43, "exemplar (arXiv:2004.04795)": -82.09},
        must=-81.4,
    ),
    "4": _FASHION,
    "4-flow": _FASHION._replace(
        title="row 4 with a flow as prior",
        stages={
            "pair": _FASHION.stages["pair"],
            "flow": _FLOW,
            "dreg": _DREG,
            "iwae": _IWAE,
        },
        published={"VampPrior (arXiv:2004.04795)": -227.35, "exemplar, same": -226.75},
        must=-226.7,
    ),
    "5": _ONE._replace(
        title="row 1 with a second layer of 16",
        stages={
            "pair": _ONE.stages["pair"],
            "layer": _LAYER,
            "dreg": _DREG,
            "iwae": _IWAE,
        },
        published=_TWO_LAYERS,
        must=-80.5,
    ),
    "5-ladder": Row(
        title="dynamic MNIST, layers of 40 and 16, a ladder guide",
        dataset="mnist",
        observe="dynamic",
        pair=named(latent_dims=(40, 16), net="conv", guide="ladder", dropout=0.1),
        stages={"pair": Stage(60, 2e-3, kl_warmup=0.1), "dreg": _DREG._replace(epochs=3)},
        published=_TWO_LAYERS,
        must=-80.5,
    ),
    "6": Row(
        title="grey MNIST, continuous Bernoulli, z = 20",
        dataset="mnist",
        observe="dequantized",
        pair=named(latent_dim=20, likelihood="continuous_bernoulli"),
        stages={"pair": Stage(5, 2e-3, weight_decay=0.0, kl_warmup=0.05, chosen=False)},
        published={"arXiv:1907.06845": 1470.0},
        must=1470.0,
        number="elbo",
        all_train=True,
    ),
    "7": Row(
        title="grey MNIST, relaxed Bernoulli (not a likelihood), MLP of 400, z = 50",
        dataset="mnist",
        observe="grey",
        pair=named(
            latent_dim=50,
            net="mlp",
            hidden=400,
            activation="softplus",
            likelihood="grey_bernoulli",
            guide="normal_log_scale",
        ),
        stages={"pair": Stage(100, 2e-3, weight_decay=0.0, chosen=False)},
        published={"Pyro's tutorial": -101.3},
        must=-101.3,
        number="elbo",
        all_train=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    name, *files = args.row
    if name == "table":
        print(table([read_json(path) for path in files]))
        return
    row = ROWS[name]
    study = start(args, f"likelihood-{name}", row.observe)
    if row.all_train:
        study = with_validation_images(study)
    if args.start_from:
        study = with_stages_of(Path(args.start_from), row, study)
    vae = row.pair(study.dataset.mean_image)
    vae.to(study.device).to(memory_format=torch.channels_last)
    trained = {}
    for which, stage in row.stages.items():
        trained[which] = train(stage, vae, part(study, which, stage)).history
        if row.number == "log_evidence":
            validate(which, vae, study)
    began = time.perf_counter()
    found = {
        "row": name,
        **{key: getattr(row, key) for key in ("title", "published", "must", "number")},
        "numbers": results.as_json(worth(row, vae, study)),
        "seed": args.seed,
        "steps": {stage: history[-1]["step"] for stage, history in trained.items()},
        "training_minutes": sum(e["seconds"] for h in trained.values() for e in h) / 60,
        "evaluation_minutes": (time.perf_counter() - began) / 60,
        "precision": args.precision,
        **run.surroundings(study.device),
    }
    study.save(found)
    print(table([found]))
    print(f"kept in {study.folder}/results.json")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.study_parser(
        "Rows of published tables: " + "; ".join(f"{k}: {row.title}" for k, row in ROWS.items()),
        training=False,
        resumable=True,
        default_data="the row's",
    )
    what = f"one of {', '.join(ROWS)}; or table, and then results.json files"
    # SUPPRESS: if no row is given, it is that of the resumed run
    parser.set_defaults(row=[], engine="captured")
    parser.add_argument("row", nargs="*", metavar="ROW", default=argparse.SUPPRESS, help=what)
    what = "epochs of each stage (default: the row's)"
    cli.option(parser, "--epochs", what, cli.NATURAL, metavar="N")
    what = "a run whose first stages of the same names are not trained again"
    cli.option(parser, "--start-from", what, metavar="RUN")
    cli.precision_argument(parser)
    cli.option(parser, "--num-samples", "draws k for log p(x)", cli.NATURAL, 500, "K")
    cli.option(parser, "--checkpoint-minutes", "minutes between checkpoints", float, 5.0, "M")
    args = cli.resumed(parser, argv)
    if args.row[:1] != ["table"]:
        if len(args.row) != 1 or args.row[0] not in ROWS:
            parser.error(
                f"ROW must be one of {', '.join(ROWS)}, or table with files, not {args.row}"
            )
        row = ROWS[args.row[0]]
        args.dataset = args.dataset or row.dataset
        if row.observe == "dynamic" and args.numpy_seed is None:
            args.numpy_seed = 777
        if args.start_from:
            try:  # before this run has a folder
                run.read_config(args.start_from)
            except ValueError as error:
                parser.error(f"--start-from {error}")
    return args


def with_validation_images(study: Study) -> Study:
    """The study with all images except the test images for training; some of them also validate."""
    parts = study.dataset.train, study.dataset.validation  # bytes, from which batches are made
    together = Split(torch.cat([part.images for part in parts]), None)
    return replace(study, data=replace(study.data, train=together))


def with_stages_of(source: Path, row: Row, study: Study) -> Study:
    """Copies the row's stages that another run has into the study, which continues from them.

    Raises ValueError if `source` is not the folder of a run, or of a run on other data.
    """
    before = run.read_config(source)["dataset"]
    study.dataset.require_same(before["name"], before["sha256"], source)
    for name in row.stages:
        if not (source / name).is_dir():
            break  # a later stage of the same name starts from another pair
        if not (study.folder / name).exists():
            shutil.copytree(source / name, study.folder / name)
    args = argparse.Namespace(**{**vars(study.args), "resume": str(study.folder)})
    return replace(study, args=args)


def part(study: Study, name: str, stage: Stage) -> Study:
    """The study of one stage, with the arguments of the stage."""
    epochs = study.args.epochs or stage.epochs
    return study.part(name, num_epochs=epochs, batch_size=stage.batch_size, ema=stage.ema)


def train(stage: Stage, vae: pvae.VAE, study: Study) -> Trainer:
    """Trains one stage; afterwards `vae` has the weights that the stage chooses."""
    if stage.change is not None:
        stage.change(vae)
        vae.to(study.device)
    trained = stage.trains(vae)
    vae.requires_grad_(False)
    trained.requires_grad_(True)
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.p = stage.dropout
    groups = pvae.optim.decay_groups(trained, stage.weight_decay)
    adam = torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)
    optimizer = pvae.SingleOptimizer(adam, clip_norm=CLIP)
    elbo = OBJECTIVES[stage.objective].elbo(stage.particles)
    svi = engine(study)(vae.model, vae.guide, optimizer, elbo)
    schedule = Schedule(kl_warmup=stage.kl_warmup, lr_warmup=0.02)
    trainer = fit(study, vae, svi, schedule=schedule)
    if stage.chosen:
        trainer.restore_best()
    else:
        last = study.folder / "last.pt"
        with trainer.averaged():
            checkpoint.save(vae, last)
        checkpoint.restore(vae, checkpoint.read(last)["model"], last)
    return trainer


def worth(row: Row, vae: pvae.VAE, study: Study) -> list[results.Row]:
    """The numbers of the trained pair on the test set."""
    subject = Subject(vae, study.data, study.args.seed, study.args.quiet)
    rows = results.elbo_rows(subject)
    rows += results.unit_rows(results.codes(subject, subject.data.test))
    return rows + (evidence(subject, study) if row.number == "log_evidence" else [])


def evidence(subject: Subject, study: Study) -> list[results.Row]:
    """`log p(x)` of all test images by importance sampling, of some of them with ten times as many
    draws, and of a few by annealing and with a proposal for each image."""
    images, k = study.data.test.images, study.args.num_samples
    some = subject.chosen(CHECKED)
    found = by_parts(subject, study.folder / "evidence", images, k, PART)
    again = by_parts(subject, study.folder / "checked", images[some], 10 * k, PART // 10)
    same = estimate(found[0, some.cpu()])
    arguments = argparse.Namespace(**ANNEALED, **PROPOSALS)
    return [
        results.Row("log_evidence", f"log p(x), k = {k:,}", estimate(found[0]), len(found[0])),
        *results.tail_rows(found[1], "pareto_k", "  "),
        results.Row(f"iwae_{10 * k}", f"log p(x), k = {10 * k:,}", estimate(again[0]), len(some)),
        results.Row("checked", f"  k = {k:,}, of the same images", same, len(some)),
        *results.tail_rows(again[1], "checked_pareto_k", "  "),
        *evaluation.annealed_rows(subject, arguments),
    ]


def by_parts(subject: Subject, start: Path, images: Tensor, k: int, size: int) -> Tensor:
    """`log p(x)` and k-hat of each image by k draws, `(2, N)`; each part of the images is kept."""
    by = sampler(subject.vae, k)
    parts = [
        weights(subject, by, part, start.with_name(f"{start.name}-{number:02}.json"), number)
        for number, part in enumerate(images.split(size))
    ]
    return torch.cat(parts, dim=1)


def validate(stage: str, vae: pvae.VAE, study: Study) -> None:
    """Prints `log p(x)` of some validation images after a stage."""
    subject, k = Subject(vae, study.data, study.args.seed, study.args.quiet), study.args.num_samples
    images = study.data.validation.images[:VALIDATED]
    path = study.folder / stage / f"validation-{k}.json"
    mean, se = estimate(weights(subject, sampler(vae, k), images, path)[0])
    print(f"{stage}: log p(x) of {len(images)} validation images, k = {k:,}: {mean:.2f} ± {se:.2f}")


def sampler(vae: pvae.VAE, num_samples: int) -> evaluate.ImportanceSampler:
    return evaluate.ImportanceSampler(
        vae.model, vae.guide, num_samples=num_samples, compiler=captured.inductor
    )


def weights(
    subject: Subject, by: evaluate.ImportanceSampler, images: Tensor, path: Path, number: int = 0
) -> Tensor:
    """`log p(x)` and k-hat of each image, `(2, N)`: read from `path`, else computed and kept."""
    if not path.is_file():
        title, seed = subject.title(f"log p(x), part {number + 1}"), subject.seed + number
        found = evaluate.over(Split(images, None), by, batch_size=20, seed=seed, title=title)
        values = {"log_evidence": found.log_evidence, "pareto_k": found.pareto_k}
        run.write_json(path, {name: t.tolist() for name, t in values.items()})
    kept = read_json(path)
    return torch.tensor([kept["log_evidence"], kept["pareto_k"]])


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown; runs of a row with several seeds are one line, with mean and sd."""
    lines = [
        "| row | published | ours | ELBO | KL | active | k-hat > .7 | minutes | processor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(found, key=lambda result: str(result["row"]))
    for name, group in groupby(ordered, key=lambda result: str(result["row"])):
        lines.append(line(name, list(group)))
    return "\n".join(lines)


def line(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    first = runs[0]

    def shown(key: str, digits: int = 2) -> str:
        values = [r["numbers"][key]["mean"] for r in runs if key in r["numbers"]]
        if not values:
            return ""
        spread = first["numbers"][key]["se"]
        if len(values) > 1:
            spread = statistics.stdev(values)
        text = f"{statistics.mean(values):.{digits}f}"
        return text if spread is None else f"{text} ± {spread:.{digits}f}"

    published = ", ".join(f"{value:g} ({of})" for of, value in first["published"].items())
    reached = statistics.mean(r["numbers"][first["number"]]["mean"] for r in runs)
    mark = "" if reached > first["must"] else f" (missed: {first['must']:g})"
    minutes = [
        statistics.mean(r[f"{what}_minutes"] for r in runs) for what in ("training", "evaluation")
    ]
    seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
    how = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    if first["precision"] != "fp32":
        how += f", {first['precision']}"
    cells = [
        f"{name}: {first['title']}{seeds}",
        published,
        f"**{shown(first['number'])}**{mark}",
        shown("elbo"),
        shown("rate"),
        shown("active_units", 0),
        shown("pareto_k_above"),
        f"{minutes[0]:.0f} + {minutes[1]:.0f}",
        f"{first['processor']}, {how}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    cli.run_main(main)
