"""The training loop: stock SVI over epochs, with progress, validation, cross-check and resume."""

import contextlib
import csv
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor
from tqdm import tqdm

from pvae import captured, checkpoint, evaluate
from pvae.builder import Objective
from pvae.crosscheck import STANDARD_ERRORS, TOLERANCE, Check, cross_check
from pvae.data import Observed, pixels
from pvae.files import write_atomically
from pvae.objectives import temper
from pvae.optim import SingleOptimizer
from pvae.vae import VAE

_LOOKS = 100  # steps after which a loss that is summed on a GPU is looked at
_CHECKED = 250  # images of the fixed validation batch that the cross-check sees


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why, and what is left to go on from."""


def kl_weight(
    step: int, total: int, *, beta: float = 1.0, warmup: float = 0.0, cycles: int = 1
) -> float:
    """The weight of the KL at a step: linear from exactly 0 to `beta` over a fraction of training,
    or of each of its `cycles`.

    Source of the cycles: Cyclical Annealing Schedule (2019), arXiv:1903.10145.

    >>> [kl_weight(step, 100, warmup=0.1) for step in (0, 5, 10, 99)]
    [0.0, 0.5, 1.0, 1.0]
    >>> [kl_weight(step, 100, warmup=0.5, cycles=2) for step in (0, 20, 40, 50, 99)]
    [0.0, 0.8, 1.0, 0.0, 1.0]
    """
    length = total / cycles
    return beta * min(1.0, step % length / (warmup * length)) if warmup > 0 else beta


def learning_rate_factor(
    step: int, total: int, *, warmup: float = 0.0, cosine: bool = True
) -> float:
    """Multiplies the learning rate at a step: a linear warm-up, then a cosine to 0 (or constant).

    >>> [round(learning_rate_factor(step, 100, warmup=0.1), 2) for step in (0, 4, 10, 55, 99)]
    [0.1, 0.5, 1.0, 0.5, 0.0]
    """
    start = warmup * total
    if step < start:
        return min(1.0, (step + 1) / start)
    return (1 + math.cos(math.pi * (step - start) / (total - start))) / 2 if cosine else 1.0


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is a fraction of training, at least 0 and below 1, not {value}")


class Trainer:
    """Trains a pair by a stock SVI object, and keeps in a folder what a resumed run needs.

    After each epoch it computes the validation ELBO (always at beta = 1), cross-checks SVI
    against the hand-written loss, and writes `metrics.csv`, `checkpoint.pt` (the last state) and,
    where the validation ELBO is the best so far, `best.pt`. Without a folder nothing is written.

    Args:
        vae: the pair; its parameters are those of the optimizer in `svi`.
        svi: `pyro.infer.SVI`, or `pvae.captured.SVI`, over `vae.model` and `vae.guide`, with a
            `SingleOptimizer`.
        objective: the entry of `pvae.builder.OBJECTIVES` whose ELBO `svi` has; for the cross-check.
        data: the observed data set, on the device of `vae`.
        epochs, batch_size: how long, and how many images a step.
        beta: weight of the KL after its warm-up (1 is the ELBO).
        kl_warmup, lr_warmup: fractions of training in which each rises linearly.
        kl_cycles: how often the KL's weight does so, each time in its share of training.
        cosine: whether the learning rate falls to 0 along a cosine.
        labels: whether labels are given to the programs.
        precision: of a training step: "fp32", "tf32" (matrix products on a GPU) or "bf16" (the
            networks, by autocast). Numbers are always reported in float32.
        seed: of the shuffles and redrawn pixels; the guide's noise is the global random state's.
        folder: where the run is kept.
        quiet: no progress bar, no line an epoch.
        on_epoch: called after each epoch with the trainer.
        go_on: what a person types to go on with a stopped run, such as "--resume runs/a"; part of
            the message that stops it.

    Raises:
        ValueError: an argument out of its range, data outside the likelihood's support, or labels
            asked for where there are none.

    >>> import pyro, pvae
    >>> from pvae.data import load, observe
    >>> from pvae.builder import OBJECTIVES
    >>> data = observe(load("digits"), "dynamic")
    >>> vae = pvae.build((1, 28, 28), latent_dim=2, net="mlp", hidden=16)
    >>> adam = SingleOptimizer(torch.optim.Adam(vae.parameters(), lr=1e-2))
    >>> objective = OBJECTIVES["trace_elbo"]
    >>> svi = SVI(vae.model, vae.guide, adam, objective.elbo(1))
    >>> trainer = Trainer(vae, svi, objective, data, epochs=2, batch_size=256, quiet=True)
    >>> trainer.fit()
    >>> [row["epoch"] for row in trainer.history]
    [1, 2]
    """

    def __init__(
        self,
        vae: VAE,
        svi: SVI,
        objective: Objective,
        data: Observed,
        *,
        epochs: int,
        batch_size: int,
        beta: float = 1.0,
        kl_warmup: float = 0.0,
        kl_cycles: int = 1,
        lr_warmup: float = 0.0,
        cosine: bool = True,
        labels: bool = False,
        precision: str = "fp32",
        seed: int = 0,
        folder: Path | None = None,
        quiet: bool = False,
        on_epoch: Callable[["Trainer"], None] | None = None,
        go_on: str | None = None,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not 1 <= kl_cycles <= epochs:
            raise ValueError(f"kl_cycles must be from 1 to the {epochs} epochs, not {kl_cycles}")
        _check_fraction("kl_warmup", kl_warmup)
        _check_fraction("lr_warmup", lr_warmup)
        if not isinstance(svi.optim, SingleOptimizer):
            raise ValueError(
                f"svi has a {type(svi.optim).__name__} optimizer; the trainer schedules and saves "
                "one torch optimizer: give SVI a pvae.SingleOptimizer"
            )
        if precision not in ("fp32", "tf32", "bf16"):
            raise ValueError(f"precision must be one of fp32, tf32, bf16, not {precision!r}")
        if labels and data.train.labels is None:
            raise ValueError("labels are asked for, but the data set has none")
        self.vae, self.svi, self.objective, self.data = vae, svi, objective, data
        self.optimizer = svi.optim.optimizer
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.beta, self.kl_warmup, self.kl_cycles = beta, kl_warmup, kl_cycles
        self.lr_warmup, self.cosine = lr_warmup, cosine
        self.labels, self.folder, self.quiet, self.on_epoch = labels, folder, quiet, on_epoch
        self.go_on = go_on
        self.precision = precision
        self.steps_per_epoch = math.ceil(len(data.train.images) / batch_size)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._kept_epochs = 0
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._checked = self._batch(data.validation.images[:_CHECKED], data.validation.labels)
        self.vae.check(*self._checked)
        self._cross_check(1.0)  # what cannot work together is refused before the run

    # ---- the loop ----

    def fit(self, until: int | None = None) -> None:
        """Trains from wherever the trainer stands to the last epoch, or to the epoch `until`; the
        schedules are those of all epochs.

        Raises:
            TrainingFailed: the loss is not finite, or Pyro and the hand-written loss disagree.
            KeyboardInterrupt: as it came, with a message that says how to go on.
        """
        images = len(self.data.train.images)
        if not self.quiet:
            self._say(_header())
        # the bar covers the whole run: it shows images a second and the time left.
        # disable=None: no bar where the output is not a terminal
        with tqdm(
            total=images * self.epochs,
            initial=images * self.epoch,
            unit="img",
            unit_scale=True,
            leave=False,
            disable=True if self.quiet else None,
        ) as bar:
            try:
                while self.epoch < (self.epochs if until is None else until):
                    self._one_epoch(bar)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"stopped in epoch {self.epoch + 1} of {self.epochs}.{self._kept()}"
                ) from None

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def best(self) -> dict[str, float]:
        """The row of the history with the best validation ELBO."""
        return max(self.history, key=lambda row: row["validation_elbo"])

    def _one_epoch(self, bar: Any) -> None:
        start = time.perf_counter()
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        train_elbo = self._train(bar)
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "beta": self._beta(self.step - 1),
            "train_elbo": train_elbo,
            **self._validate(),
        }
        check = self._cross_check(row["beta"])
        row["seconds"] = time.perf_counter() - start
        row |= _check_columns(check)
        self.history.append(row)
        self._keep()
        if not self.quiet:
            self._say(_line(row, check))
        if check.suspicious:
            self._say(
                f"warning: the sampled KL is off the analytic one by more than "
                f"{STANDARD_ERRORS:g} standard errors: {check}"
            )
        if self.on_epoch is not None:
            self.on_epoch(self)

    def _train(self, bar: Any) -> float:
        """One pass over the data; the mean of the (tempered) objective, nats per image."""
        self.vae.train()
        total: Any = 0.0  # on a GPU a tensor there, which is read now and then
        batches = self.data.batches(self.batch_size, seed=self.seed, epoch=self.epoch)
        for x, y in batches:
            self._set_learning_rate()
            total = total + self._step(x, y if self.labels else None)
            self.step += 1
            bar.update(len(x))
            if self.step % _LOOKS == 0:
                self._finite(float(total))
        return -self._finite(float(total)) / len(self.data.train.images)

    def _step(self, x: Tensor, y: Tensor | None) -> float | Tensor:
        launch = self.svi.launch if isinstance(self.svi, captured.SVI) else self.svi.step
        try:
            with temper(self._beta(self.step)), self._precisely(x.device.type):
                loss = launch(x, y)
        except ValueError as error:
            # Pyro's validation stops at a NaN parameter before there is a loss
            if all(p.isfinite().all() for p in self.vae.parameters()):
                raise
            raise TrainingFailed(self._not_finite("not a number")) from error
        # to read a number from a GPU is to wait for it
        return loss if isinstance(loss, Tensor) and loss.is_cuda else self._finite(float(loss))

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrainingFailed(self._not_finite(loss))
        return loss

    @contextlib.contextmanager
    def _precisely(self, device: str) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else before)
        try:
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _validate(self) -> dict[str, float]:
        """The means of the ELBO at beta = 1 and its terms, with fixed noise."""

        def bound(x: Tensor, y: Tensor | None) -> evaluate.Bound:
            return evaluate.elbo(self.vae.model, self.vae.guide, x, y if self.labels else None)

        means = evaluate.over(self.data.validation, bound, batch_size=500, seed=self.seed)
        return {f"validation_{name}": t.mean().item() for name, t in means._asdict().items()}

    def _cross_check(self, beta: float) -> Check:
        check = cross_check(
            self.svi, self.vae, self.objective, *self._checked, beta=beta, seed=self.seed
        )
        if not check.agrees:
            when = f"after epoch {self.epoch + 1}" if self.step else "before the first epoch"
            raise TrainingFailed(
                f"the cross-check failed {when}: at the same noise, SVI's "
                f"loss and the hand-written loss differ by {check.relative:.2e}, relative "
                f"({TOLERANCE:g} is allowed). The model, the guide or the oracle is not what it "
                "claims to be"
            )
        return check

    # ---- schedules ----

    def _beta(self, step: int) -> float:
        return kl_weight(
            step,
            self.epochs * self.steps_per_epoch,
            beta=self.beta,
            warmup=self.kl_warmup,
            cycles=self.kl_cycles,
        )

    def _set_learning_rate(self) -> None:
        total = self.epochs * self.steps_per_epoch
        factor = learning_rate_factor(self.step, total, warmup=self.lr_warmup, cosine=self.cosine)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor

    # ---- what is kept ----

    def _keep(self) -> None:
        if self.folder is None:
            return
        _write_csv(self.folder / "metrics.csv", self.history)
        if self.best is self.history[-1]:
            best = {
                "model": self.vae.state_dict(),
                "recipe": self.vae.recipe,
                "epoch": self.epoch,
                "validation_elbo": self.best["validation_elbo"],
            }
            checkpoint.save(self.folder / "best.pt", best)
        checkpoint.save(self.folder / "checkpoint.pt", self.state())
        self._kept_epochs = self.epoch

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values only."""
        saved = self.optimizer.state_dict()["state"]
        optimizer = {path: saved[i] for i, path in enumerate(self._paths()) if i in saved}
        device = self._checked[0].device
        return {
            "model": self.vae.state_dict(),
            "recipe": self.vae.recipe,
            "optimizer": optimizer,  # by module path: store names differ from run to run
            "history": self.history,
            "step": self.step,
            "random_state": torch.get_rng_state(),
            "device_random_state": _device_random_state(device),
        }

    def resume(self, path: str | Path) -> None:
        """Goes back to the state of a checkpoint; nothing is changed if it does not fit.

        Raises:
            FileNotFoundError, ValueError: no checkpoint, a damaged one, or of another architecture.
        """
        state = checkpoint.read(path)
        checkpoint.restore(self.vae, state["model"], path)
        saved = state["optimizer"]
        by_index = {i: saved[path] for i, path in enumerate(self._paths()) if path in saved}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        self.history, self.step = state["history"], state["step"]
        self._kept_epochs = self.epoch
        torch.set_rng_state(state["random_state"])
        if state["device_random_state"] is not None:
            _set_device_random_state(self._checked[0].device, state["device_random_state"])

    def _paths(self) -> list[str]:
        """The module path of each parameter, in the optimizer's order."""
        paths = {p: path for path, p in self.vae.named_parameters()}
        return [paths[p] for group in self.optimizer.param_groups for p in group["params"]]

    # ---- what is said ----

    def _say(self, text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # a pipe is to see each epoch as it ends

    def _batch(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = labels[: len(images)] if self.labels and labels is not None else None
        return pixels(images), y

    def _not_finite(self, loss: float | str) -> str:
        return (
            f"the loss is {loss} by step {self.step} (epoch {self.epoch + 1}).{self._kept()} Try a "
            "smaller learning rate; with a learned scale, a larger floor or dequantised pixels"
        )

    def _kept(self) -> str:
        if not self._kept_epochs:
            return " Nothing was kept yet."
        by = "" if self.go_on is None else f"; go on by {self.go_on}"
        return (
            f" {self.folder}/checkpoint.pt holds the state after epoch {self._kept_epochs}, "
            f"best.pt the best model so far{by}."
        )


def _device_random_state(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def _set_device_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)


def _check_columns(check: Check) -> dict[str, float]:
    columns = {} if check.relative is None else {"check_relative": check.relative}
    if check.kl_difference is not None:
        columns |= {"check_kl": check.kl_difference.mean, "check_kl_se": check.kl_difference.se}
    return columns


def _header() -> str:
    return (
        "nats per image; train: the objective at this beta; validation: ELBO at beta = 1\n"
        f"{'epoch':>5} {'beta':>5} {'train':>9} {'validation':>10} {'reconstr.':>10} {'KL':>7} "
        f"{'time':>7}  SVI against the hand-written loss"
    )


def _line(row: dict[str, float], check: Check) -> str:
    return (
        f"{row['epoch']:>5} {row['beta']:>5.2f} {row['train_elbo']:>9.2f} "
        f"{row['validation_elbo']:>10.2f} {row['validation_reconstruction']:>10.2f} "
        f"{row['validation_kl']:>7.2f} {row['seconds']:>6.1f}s  {check}"
    )


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
