"""A run has one start, one fit, one finish: what every program that trains a pair goes through."""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from pvae import captured, data, keeping, memory, plots, processes, report, results, run
from pvae.files import remove_leftovers
from pvae.results import Row
from pvae.schedule import Schedule
from pvae.train import Trainer
from pvae.vae import VAE

# What runs a step
ENGINES: Mapping[str, Callable[..., SVI]] = {
    "eager": SVI,
    "captured": captured.SVI,
    "cuda-graph": partial(captured.SVI, record=captured.cuda_graph),
}
PAYS_BACK = 3000  # steps; to capture takes 10 to 30 s, and saves a sixth of a step or more

DEFAULT = Schedule(kl_warmup=0.05, lr_warmup=0.05)


@dataclass(frozen=True)
class Study:
    """What a run starts from: its arguments, folder and device, the data set, and what of it the
    pair observes."""

    args: argparse.Namespace
    folder: Path
    device: torch.device
    dataset: data.Dataset
    data: data.Observed
    began: float  # by time.perf_counter
    go_on: str | None = None  # what a person types to go on, where the program takes it

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def part(self, name: str) -> "Study":
        """A study of one pair among several: a run folder of its own inside this one, which is
        there already where the study is resumed."""
        folder = self.folder / name
        folder.mkdir(exist_ok=self.args.resume is not None)
        run.write_json(folder / "config.json", run.read_config(self.folder))
        return replace(self, folder=folder, began=time.perf_counter())

    def save(self, numbers: Mapping[str, Any], **figures: plots.Figure) -> None:
        """Writes `results.json` and the figures, each by its name."""
        run.write_json(self.folder / "results.json", numbers)
        for name, figure in figures.items():
            plots.save(figure, self.folder / f"{name}.png")


def start(args: argparse.Namespace, name: str, observe: str | None = None) -> Study:
    """Seeds, finds the device and the data, and makes the run's folder (or opens the resumed one).

    Args:
        args: of a `cli.parser` or `cli.study_parser`.
        name: of the folder in `runs/`.
        observe: one of `pvae.data.OBSERVATIONS`; None where `args.observe` is it.

    Raises:
        ValueError: a device that is not there, data that cannot be used, a folder that is in use,
            or a resumed run that was started on other data.
    """
    began = time.perf_counter()
    pyro.set_rng_seed(args.seed)
    device = find_device(args.device)
    dataset = data.load(args.dataset, args.data_root, seed=args.data_seed)
    device = processes.start(device)
    if processes.count() > 1 and not args.engine:
        raise ValueError(f"this study runs in one process, not in {processes.count()}")
    args.quiet = args.quiet or not processes.is_first()
    if dataset.note and processes.is_first():
        print(dataset.note)
    args.observe = observe or args.observe
    if hasattr(args, "num_epochs"):  # a study that trains
        args.num_epochs = num_epochs(args, len(dataset.train.images))
    folder = processes.from_first(lambda: _folder(args, name, dataset, device))
    kept = memory.keep_freed_memory()
    observed = data.observe(dataset, args.observe, args.data_seed).to(device)
    if not args.quiet:
        sizes = "/".join(f"{len(s.images):,}" for s in dataset.splits)
        print(f"data: {dataset.name}, {sizes} images of {dataset.image_shape}, {observed.label}")
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
    """Trains the pair for the study's epochs, in its folder; goes on where a resumed run stopped.

    `on_epoch` is called after each epoch.

    Raises:
        ValueError, pvae.train.TrainingFailed: as of `Trainer`.
    """
    args = study.args
    if not args.quiet:
        print(f"pair: {_described(vae)}")
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
        folder=study.folder,
        checkpoint_minutes=args.checkpoint_minutes,
        quiet=args.quiet,
        on_epoch=on_epoch,
        go_on=study.go_on,
    )
    if args.resume and keeping.exists(study.folder):  # else it was stopped before the first one
        trainer.resume(study.folder / "checkpoint.pt")
    trainer.fit()
    return trainer


def finish(study: Study, trainer: Trainer, *, quiet: bool = False) -> list[Row]:
    """The end of a run: the model of the best validation ELBO, its numbers on the test set, which
    is touched here, once, the pictures and the table.

    Leaves `results.json` and the pictures in the study's folder. `quiet` leaves out the table.
    """
    vae, args = trainer.vae, study.args
    trainer.restore_best()
    subject = results.Subject(vae, study.data, args.seed, args.quiet)
    rows = results.end_of_run(subject)
    if not processes.is_first():
        processes.wait()  # torchrun ends the first process where another one fails on its way out
        return rows
    seconds, best = study.seconds, trainer.best["epoch"]
    numbers = {"numbers": results.as_json(rows), "best_epoch": best, "seconds": seconds}
    run.write_json(study.folder / "results.json", numbers)
    report.pictures(
        vae,
        study.data,
        trainer.history,
        study.folder,
        elbo=rows[0].value.mean,
        objective=trainer.objective,
        class_names=study.dataset.class_names,
        seed=args.seed,
    )
    if not quiet:
        print(results.table(rows, subject, study.dataset.name))
        print(f"best epoch {best}; {seconds:.0f} s; pictures and numbers: {study.folder}/")
    processes.wait()
    return rows


# ---- what the arguments ask for ----


def find_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first there is of cuda, mps, cpu.

    Raises:
        ValueError: the device is not there.

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
    """`-n`, or 10 epochs, or as many as make 1,000 steps where the data set is small."""
    return args.num_epochs or max(10, math.ceil(1000 / math.ceil(images / args.batch_size)))


def engine(study: Study) -> Callable[..., SVI]:
    """`pyro.infer.SVI`, or `captured.SVI` where `--engine` asks for it; says which.

    `auto` captures where the run is long enough to pay for it.

    Raises:
        ValueError: a CUDA graph is asked for on another device.
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
    """The run's folder, new or the resumed one, for this run alone, with its configuration."""
    folder = Path(args.resume) if args.resume else run.new_folder(args.out, name)
    keeping.lock(folder)
    remove_leftovers(folder)
    _keep_config(folder, args, dataset, device)
    return folder


def _keep_config(
    folder: Path, args: argparse.Namespace, dataset: data.Dataset, device: torch.device
) -> None:
    """Writes `config.json`; of a resumed run, once it is known that the data is still the same."""
    if args.resume is not None:
        before = run.read_config(folder)
        dataset.require_same(before["dataset"]["name"], before["dataset"]["sha256"], folder)
        _tell_changes(before, {"processor": run.processor(device), **run.versions()})
    config = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("observe", "resumable")},
        "dataset": {"name": dataset.name, "sha256": dataset.sha256, "observed": args.observe},
        "seed": args.seed,
        "data_seed": args.data_seed,
        "processor": run.processor(device),
        "versions": run.versions(),
    }
    run.write_json(folder / "config.json", config)


def _tell_changes(config: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """A warning where what a run's numbers depend on is not what it was."""
    before = {"processor": config.get("processor"), **config["versions"]}
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        print(f"warning: {', '.join(changed)}: the rest of this run may differ by rounding")
