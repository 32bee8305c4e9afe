"""Finished runs side by side: one table and one figure.

    python -m pvae.compare runs/mnist_svi runs/mnist_svi-2

A table holds the numbers of each run on the test set; another shows the arguments that differ. Runs
on different data, or whose numbers mean different things, are refused: such numbers cannot be
compared.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pvae import cli, plots, results, run, tables
from pvae.builder import LIKELIHOODS
from pvae.data import OBSERVATIONS, STANDARDIZED
from pvae.evaluate import Estimate

# arguments that say where a run is kept and what it prints; they do not change its numbers
_NOT_TOLD = {"out", "resume", "quiet", "data_root", "checkpoint_minutes", "tensorboard"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `python -m pvae.compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m pvae.compare",
        description="Finished runs side by side: one table and one figure.",
        formatter_class=cli.Formatter,
    )
    what = "folders of finished runs, two or more; the parts of a study are runs too"
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help=what)
    parser.add_argument("--out", default="compare.png", metavar="PNG", help="the figure")
    args = parser.parse_args(argv)
    if len({Path(name).resolve() for name in args.runs}) != len(args.runs) or len(args.runs) < 2:
        parser.error(f"runs must be two folders or more, each once, not {' '.join(args.runs)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables of the runs, and draws their figure."""
    args = arguments(argv)
    configs = {name: run.read_config(name) for name in args.runs}
    numbers = {name: _numbers(Path(name)) for name in args.runs}
    check_comparable(configs)
    title = _title(configs)
    keys = list(dict.fromkeys(key for row in numbers.values() for key in row))
    rows = [[name, *(shown(row.get(key)) for key in keys)] for name, row in numbers.items()]
    header = [key.replace("_", " ") for key in keys]
    print(tables.columns(f"{title}; mean ± se over the test set", ["", *header], rows))
    differing = differences(configs)
    if differing:
        told = [[name, *row] for name, *row in zip(configs, *differing.values(), strict=True)]
        print("\n" + tables.columns("what differs", ["", *differing], told))
    else:
        print("their arguments, seeds and versions are the same")
    if len({_data_seeds(config) for config in configs.values()}) > 1:
        print("warning: their data seeds differ: other splits, or other draws of their pixels")
    plots.save(picture(numbers, title), args.out)
    print(f"\nthe se says nothing of other seeds; figure: {args.out}")


def _numbers(folder: Path) -> dict[str, Estimate]:
    """The numbers of a finished run.

    Raises:
        ValueError: the run is not finished, the folder holds several runs, or its file is damaged.
    """
    path = folder / "results.json"
    run.check_alone(folder)
    if not path.is_file():
        raise ValueError(f"{folder} is not a finished run: it has no results.json")
    return results.read(path)


def check_comparable(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs that differ in the data, in how these are observed, or in the kind of p(x|z).

    The kind is a probability, a density, or not a likelihood.

    Raises:
        ValueError: two runs differ; the message names them and says in what they differ.
    """
    for what, of in (("the data", _data), ("how it is observed", _observed), ("p(x|z)", _kind)):
        found = {name: of(config) for name, config in configs.items()}
        known = {name: kind for name, kind in found.items() if kind is not None}
        if len(set(known.values())) > 1:
            first, *_ = known
            other = next(name for name in known if known[name] != known[first])
            raise ValueError(
                f"{what} must be the same for numbers to be compared: {first} has "
                f"{known[first]}, {other} has {known[other]}"
            )


def _data(config: Mapping[str, Any]) -> str:
    return f"{config['dataset']['name']} ({config['dataset']['sha256'][:12]})"


def _observed(config: Mapping[str, Any]) -> str:
    how = str(config["dataset"]["observed"])
    label = OBSERVATIONS[how].label if how in OBSERVATIONS else how
    return label + STANDARDIZED * bool(config["arguments"].get("standardize"))


def _kind(config: Mapping[str, Any]) -> str | None:
    """The kind of the run's numbers, by the name of its likelihood; None if it has no such name."""
    name = config["arguments"].get("likelihood")
    return LIKELIHOODS[name].kind if isinstance(name, str) and name in LIKELIHOODS else None


def _data_seeds(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The data seed, and NumPy's seed of the pixels (or None); version 0.1 had a single seed."""
    return config.get("data_seed", config["seed"]), config["arguments"].get("numpy_seed")


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs: by name, the value of each run, in order.

    >>> runs = {"a": {"arguments": {"seed": 0, "net": "mlp"}}, "b": {"arguments": {"seed": 1}}}
    >>> differences(runs)
    {'seed': ['0', '1'], 'net': ['mlp', '-']}
    """
    given = [_told(config) for config in configs.values()]
    names = dict.fromkeys(name for settings in given for name in settings)
    rows = {name: [settings.get(name, "-") for settings in given] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _told(config: Mapping[str, Any]) -> dict[str, str]:
    """The arguments, versions, processor and threads of a run, as text."""
    settings = {**config["arguments"], **config.get("versions", {})}
    settings |= {name: config.get(name) for name in ("processor", "threads")}
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in settings.items()
        if name not in _NOT_TOLD and value is not None
    }


def shown(estimate: Estimate | None) -> str:
    """A number as text for the table, with its standard error if it has one.

    >>> shown(Estimate(-94.054, 0.23)), shown(Estimate(28.0, math.nan)), shown(None)
    ('-94.05 ± 0.23', '28', '')
    """
    if estimate is None or math.isnan(estimate.mean):
        return ""
    if math.isnan(estimate.se):
        return f"{estimate.mean:g}"
    digits = 4 if estimate.se < 0.01 else 2
    return f"{estimate.mean:.{digits}f} ± {estimate.se:.{digits}f}"


def _title(configs: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(configs.values()))
    text = f"{first['dataset']['name']} test set, {_observed(first)}; nats"
    kinds: Iterable[str | None] = map(_kind, configs.values())
    if any(kind is not None and kind.endswith("not a likelihood") for kind in kinds):
        text += "; p(x|z) is not a likelihood"
    return text


def picture(numbers: Mapping[str, Mapping[str, Estimate]], title: str) -> Figure:
    """Draws each number in its own panel: a row for each run, with mean and two standard errors."""
    keys = list(dict.fromkeys(key for row in numbers.values() for key in row))
    columns = min(4, len(keys))
    lines = math.ceil(len(keys) / columns)
    size = 2.6 * columns + 2, lines * (1.1 + 0.28 * len(numbers)) + 0.4
    figure = Figure(size, dpi=150, layout="constrained")
    # parse_math=False: a dollar sign in a name would start a formula
    heading = f"{title}\nmean ± 2 se over the test set"
    figure.suptitle(heading, fontsize=10, parse_math=False)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for key, panel in zip(keys, panels, strict=False):
        panel.set_title(key.replace("_", " "), fontsize=9)
        for place, row in enumerate(numbers.values()):
            mean, se = row.get(key, Estimate(math.nan, math.nan))
            error = None if math.isnan(se) else 2 * se
            panel.errorbar(mean, place, xerr=error, fmt="o", markersize=4, color=f"C{place % 10}")
        panel.set_yticks(range(len(numbers)), list(numbers), fontsize=8, parse_math=False)
        panel.set_ylim(len(numbers) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize=7)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    return figure


if __name__ == "__main__":
    cli.run_main(main)
