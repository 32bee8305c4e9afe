"""The three steps of every program that trains a pair: `start`, `fit` and `finish`."""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from pvae import (
    captured,
    data,
    explorer,
    keeping,
    memory,
    page,
    plots,
    processes,
    report,
    results,
    run,
    streaming,
)
from pvae.files import remove_leftovers
from pvae.results import Row
from pvae.schedule import Schedule
from pvae.train import Trainer
from pvae.vae import VAE

#: The classes of SVI that run a step, by name.
ENGINES: Mapping[str, Callable[..., SVI]] = {
    "eager": SVI,
    "captured": captured.SVI,
    "cuda-graph": partial(captured.SVI, record=captured.cuda_graph),
}
PAYS_BACK = 3000  # steps: a capture takes 10 to 30 s, and saves a sixth of each step or more

DEFAULT = Schedule(kl_warmup=0.05, lr_warmup=0.05)


@dataclass(frozen=True)
class Study:
    """What a run starts from: its arguments, folder and device, the data set (`dataset`), and the
    data as the pair observes them (`data`)."""

    args: argparse.Namespace
    folder: Path
    device: torch.device
    dataset: data.Dataset
    data: data.Observed
    began: float  # by time.perf_counter
    go_on: str | None = None  # what a person types to continue, if the program allows it

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def part(self, name: str, **arguments: Any) -> "Study":
        """The study of one pair among several, with `arguments` in the place of this study's.

        It has its own run folder inside this one; in a resumed study that folder may exist already.
        """
        folder = self.folder / name
        folder.mkdir(exist_ok=self.args.resume is not None)
        config = run.read_config(self.folder)
        config["arguments"] |= arguments
        args = argparse.Namespace(**{**vars(self.args), **arguments})
        run.write_json(folder / "config.json", {**config, "seed": args.seed})
        return replace(self, args=args, folder=folder, began=time.perf_counter())

    def save(self, numbers: Mapping[str, Any], **figures: plots.Figure) -> None:
        """Writes `numbers` as `results.json`, and each figure as a PNG file of its name."""
        run.write_json(self.folder / "results.json", numbers)
        for name, figure in figures.items():
            plots.save(figure, self.folder / f"{name}.png")


def start(args: argparse.Namespace, name: str, observe: str | None = None) -> Study:
    """Seeds, finds device and data, and makes the run's folder or opens that of a resumed run.

    Args:
        args: the arguments of a `cli.parser` or `cli.study_parser`.
        name: the name of the folder in `runs/`.
        observe: one of `pvae.data.OBSERVATIONS`; None takes `args.observe`.

    Raises:
        ValueError: the device does not exist, the data cannot be used or lack the labels that
            `--conditional` needs, the folder is in use or holds files, several processes are asked
            for a study that runs in one, or the resumed run was started on other data.
        OSError: the folder cannot be written.
        ConnectionError: another process does not answer.
    """
    began = time.perf_counter()
    pyro.set_rng_seed(args.seed)
    device = find_device(args.device)
    args.observe = observe or args.observe
    dataset = data.load(
        args.dataset,
        args.data_root,
        seed=args.data_seed,
        split=args.split,
        as_is=args.observe == "as_is",
        stream=args.stream,
        workers=args.workers,
    )
    if getattr(args, "conditional", False) and dataset.num_classes is None:
        raise ValueError(f"--conditional needs labels, and {dataset.name} has none: leave it out")
    if not dataset.pictures:
        _check_pixels_unasked(args, dataset.name)
        args.observe = "as_is"
    device = processes.start(device)
    if processes.count() > 1 and not args.engine:
        raise ValueError(f"this study runs in one process, not in {processes.count()}")
    args.quiet = args.quiet or not processes.is_first()
    if dataset.note and processes.is_first():
        print(dataset.note)
    if hasattr(args, "num_epochs"):  # a study that trains
        args.num_epochs = num_epochs(args, len(dataset.train.images))
    folder = processes.from_first(lambda: _folder(args, name, dataset, device))
    kept = memory.keep_freed_memory()
    observed = data.observe(
        dataset,
        args.observe,
        args.data_seed,
        standardize=args.standardize,
        numpy_seed=args.numpy_seed,
    )
    if observed.scaling is not None and processes.is_first():
        observed.scaling.save(folder / "scaling.npz")
    observed = observed.to(device)
    if not args.quiet:
        sizes = "/".join(f"{len(s.images):,}" for s in dataset.splits)
        what = "images" if dataset.pictures else "data"
        print(f"data: {dataset.name}, {sizes} {what} of {dataset.image_shape}, {observed.label}")
        allocator = "; the C allocator keeps freed memory" if kept else ""
        group = "" if processes.count() == 1 else f", {processes.count()} processes"
        print(f"run: on {device}{group}{allocator}; kept in {folder}/")
    go_on = f"--resume {folder}" if args.resumable else None
    return Study(args, folder, device, dataset, observed, began, go_on)


def fit(
    study: Study,
    vae: VAE,
    svi: SVI,
    *,
    schedule: Schedule = DEFAULT,
    on_epoch: Callable[[Trainer], None] | None = None,
) -> Trainer:
    """Trains the pair for the study's epochs, in its folder; continues a resumed run.

    `on_epoch` is called after each epoch; with `--tensorboard`, the logger of the epoch too.

    Raises:
        ValueError, pvae.train.TrainingFailed, pvae.stopping.Stopped, ConnectionError: for the
            reasons that `Trainer` and `Trainer.fit` name.
    """
    args = study.args
    if not args.quiet:
        print(f"pair: {_described(vae)}")
    called = [] if on_epoch is None else [on_epoch]
    if args.tensorboard:
        called.append(report.tensorboard(study.data, study.folder, args.num_epochs))

    def after_epoch(trainer: Trainer) -> None:
        for callback in called:
            callback(trainer)

    trainer = Trainer(
        vae,
        svi,
        study.data,
        epochs=args.num_epochs,
        batch_size=args.batch_size,
        schedule=schedule,
        precision=args.precision,
        seed=args.seed,
        accumulate=args.accumulate,
        ema=args.ema,
        patience=args.patience,
        folder=study.folder,
        checkpoint_minutes=args.checkpoint_minutes,
        quiet=args.quiet,
        on_epoch=after_epoch,
        go_on=study.go_on,
    )
    if args.resume and keeping.exists(study.folder):  # else it stopped before the first one
        trainer.resume(study.folder / "checkpoint.pt")
    rate = "" if args.quiet else _rate_of_data(study)
    begun, step = time.perf_counter(), trainer.step
    trainer.fit()
    if rate:
        seen = (trainer.step - step) * args.batch_size / (time.perf_counter() - begun)
        print(f"{rate}; training, with its validation, took {seen:,.0f}")
    return trainer


def finish(study: Study, trainer: Trainer, *, quiet: bool = False) -> list[Row]:
    """Loads the model of the best validation ELBO, and computes its numbers on the test set.

    The test set is touched only here, once. Writes `results.json`, the pictures and `report.html`
    into the study's folder, and returns the rows of the table. With `quiet` the table is not
    printed.
    """
    vae, args = trainer.vae, study.args
    trainer.restore_best()
    subject = results.Subject(vae, study.data, args.seed, args.quiet)
    rows = results.end_of_run(subject)
    if not processes.is_first():
        processes.wait()  # torchrun ends the first process if another one fails as it exits
        return rows
    seconds, best = study.seconds, trainer.best["epoch"]
    epochs = trainer.history
    numbers = {
        "numbers": results.as_json(rows, study.data.units),
        "best_epoch": best,
        "epochs": len(epochs),
        "seconds": seconds,
        "seconds_per_epoch": statistics.median(row["seconds"] for row in epochs),
    }
    run.write_json(study.folder / "results.json", numbers)
    pictures = report.pictures(
        vae,
        study.data,
        epochs,
        study.folder,
        elbo=rows[0].value.mean,
        objective=trainer.objective,
        class_names=study.dataset.class_names,
        seed=args.seed,
    )
    names = study.dataset.class_names
    page.write(
        study.folder,
        rows,
        results.heading(subject, study.dataset.name),
        pictures,
        explorer.explore(vae, study.data, class_names=names, seed=args.seed),
        units=study.data.units,
        remarks=results.remarks(rows),
        pair=_described(vae),
    )
    if not quiet:
        print(results.table(rows, subject, study.dataset.name))
        print(f"best epoch {best}; {seconds:.0f} s; all on one page: {study.folder}/report.html")
    processes.wait()
    return rows


def _rate_of_data(study: Study, seconds: float = 2.0) -> str:
    """How fast streamed images are read, without any training; "" for images in memory."""
    if not isinstance(study.data.train.images, streaming.Streamed):
        return ""
    begun, images = time.perf_counter(), 0
    for x, _ in study.data.batches(study.args.batch_size, seed=study.args.seed, epoch=0):
        images += len(x) * processes.count()
        if (took := time.perf_counter() - begun) > seconds:
            break
    return f"images a second: {images / took:,.0f} come from the data alone"


# ---- what the arguments select ----


def _check_pixels_unasked(args: argparse.Namespace, name: str) -> None:
    for flag, asked in (
        (f"--binarize {args.binarize}", args.binarize not in (None, "none")),
        ("--dequantize", args.dequantize),
    ):
        if asked:
            raise ValueError(f"{flag} is for pictures, and {name} holds none: leave it out")


def find_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first of cuda, mps and cpu that the machine has.

    Raises:
        ValueError: the machine does not have the device.

    >>> find_device("cpu")
    device(type='cpu')
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    chosen = there[0] if name == "auto" else name
    if chosen not in there:
        raise ValueError(f"--device must be one that is here, {', '.join(there)}, not {name}")
    return torch.device(chosen)


def num_epochs(args: argparse.Namespace, images: int) -> int:
    """The number of epochs: `-n` if it is given, else 10, or as many as make 1,000 steps if the
    data set is small."""
    return args.num_epochs or max(10, math.ceil(1000 / math.ceil(images / args.batch_size)))


def engine(study: Study) -> Callable[..., SVI]:
    """The class of SVI that `--engine` selects; prints its name.

    `auto` selects `captured` for a run of at least `PAYS_BACK` steps, else `eager`.

    Raises:
        ValueError: `--engine cuda-graph` on a device other than cuda.
    """
    args = study.args
    if args.engine == "cuda-graph" and study.device.type != "cuda":
        raise ValueError(f"--engine cuda-graph needs the device cuda, not {study.device.type}")
    steps = args.num_epochs * math.ceil(len(study.dataset.train.images) / args.batch_size)
    chosen = args.engine
    if chosen == "auto":
        chosen = "captured" if steps >= PAYS_BACK else "eager"
    if not args.quiet:
        print(f"engine: {_engine_line(chosen, steps)}")
    return ENGINES[chosen]


def _engine_line(chosen: str, steps: int) -> str:
    if chosen == "eager":
        return f"eager, for a run of {steps:,} steps"
    return f"{chosen}, for a run of {steps:,} steps; the first of them waits for the compiler"


def _described(vae: VAE) -> str:
    parameters = f"{sum(p.numel() for p in vae.parameters()):,} parameters"
    if (r := vae.recipe) is None:
        return parameters
    dims = "- and ".join(map(str, r.latent_dims))
    return (
        f"{r.net} net, {dims}-D latent, {r.likelihood} likelihood, {r.guide} guide, "
        f"{r.prior} prior; {parameters}"
    )


def _folder(
    args: argparse.Namespace, name: str, dataset: data.Dataset, device: torch.device
) -> Path:
    """The folder of a new or resumed run, locked for this process, with its `config.json`."""
    folder = Path(args.resume) if args.resume else run.new_folder(args.out, name)
    keeping.lock(folder)
    remove_leftovers(folder)
    _keep_config(folder, args, dataset, device)
    return folder


def _keep_config(
    folder: Path, args: argparse.Namespace, dataset: data.Dataset, device: torch.device
) -> None:
    """Writes `config.json`; for a resumed run it first checks that the data are the same."""
    commands: list[str] = []
    now = run.surroundings(device)
    if args.resume is not None:
        before = run.read_config(folder)
        dataset.require_same(before["dataset"]["name"], before["dataset"]["sha256"], folder)
        commands = [typed for typed in before.get("commands", []) if typed != _typed()]
        _tell_changes(before, now)
    config = {
        "commands": [*commands, _typed()],
        "arguments": {k: v for k, v in vars(args).items() if k not in ("observe", "resumable")},
        "dataset": {"name": dataset.name, "sha256": dataset.sha256, "observed": args.observe},
        "seed": args.seed,
        "data_seed": args.data_seed,
        **now,
    }
    run.write_json(folder / "config.json", config)


def _typed() -> str:
    """The command that a person typed."""
    group = processes.count()
    start = ["python"] if group == 1 else ["torchrun", "--nproc-per-node", str(group)]
    return shlex.join([*start, *sys.argv])


def _tell_changes(config: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns if the processor, the number of threads or a version is not that of `config`.

    It says nothing of what `config` lacks, as those of older versions of the package do.
    """
    before, after = {**config, **config.get("versions", {})}, dict(now)
    after |= after.pop("versions")
    changed = [f"{k} {before[k]} -> {v}" for k, v in after.items() if before.get(k, v) != v]
    if changed:
        print(f"warning: {', '.join(changed)}: the rest of this run may differ by rounding")
