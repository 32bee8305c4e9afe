"""How the KL's weight and the learning rate change over training."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Schedule(NamedTuple):
    """The KL's weight rises from 0 to `beta`; the learning rate rises, then falls along a cosine.

    Args:
        beta: the weight of the KL after its warm-up; 1 is the ELBO.
        kl_warmup: the fraction of training (of each cycle) in which the weight rises: one fraction
            for all latent layers, or a sequence with one for each layer, `z1` first.
        kl_cycles: the number of cycles; in each of them the weight rises from 0. Source: Cyclical
            Annealing Schedule (2019), arXiv:1903.10145.
        lr_warmup: the fraction of training in which the learning rate rises.
        cosine: whether the learning rate falls to 0 after its warm-up; else it stays constant.
    """

    beta: float = 1.0
    kl_warmup: float | Sequence[float] = 0.0
    kl_cycles: int = 1
    lr_warmup: float = 0.0
    cosine: bool = True

    @property
    def warmups(self) -> tuple[float, ...]:
        """`kl_warmup` as a tuple: one fraction, or one for each latent layer.

        >>> Schedule(kl_warmup=0.1).warmups
        (0.1,)
        """
        if isinstance(self.kl_warmup, (int, float)):
            return (self.kl_warmup,)
        return tuple(self.kl_warmup)

    def check(self, epochs: int) -> None:
        """Raises `ValueError` if a field is out of its range for a run of `epochs` epochs.

        >>> Schedule(kl_warmup=1.0).check(10)
        Traceback (most recent call last):
        ValueError: kl_warmup must be a fraction of training, at least 0 and below 1, not 1.0
        """
        fractions = [("lr_warmup", self.lr_warmup), *(("kl_warmup", f) for f in self.warmups)]
        for name, value in fractions:
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name} must be a fraction of training, at least 0 and below 1, not {value}"
                )
        if not 1 <= self.kl_cycles <= epochs:
            raise ValueError(
                f"kl_cycles must be from 1 to the {epochs} epochs, not {self.kl_cycles}"
            )
        if self.kl_cycles > 1 and not any(self.warmups):
            raise ValueError(
                f"kl_cycles must be 1, not {self.kl_cycles}, where kl_warmup is 0: nothing rises"
            )

    def kl_weight(self, step: int, total: int, layer: int = 0) -> float:
        """The weight of the KL at a step of `total`; `layer` selects a layer's own warm-up.

        >>> [Schedule(kl_warmup=0.1).kl_weight(step, 100) for step in (0, 5, 10, 99)]
        [0.0, 0.5, 1.0, 1.0]
        >>> twice = Schedule(kl_warmup=0.5, kl_cycles=2)
        >>> [twice.kl_weight(step, 100) for step in (0, 20, 40, 50, 99)]
        [0.0, 0.8, 1.0, 0.0, 1.0]
        """
        warmup = self.warmups[layer]
        if not warmup:
            return self.beta
        length = total / self.kl_cycles
        return self.beta * min(1.0, step % length / (warmup * length))

    def learning_rate_factor(self, step: int, total: int) -> float:
        """The factor of the learning rate at a step of `total`.

        >>> rise = Schedule(lr_warmup=0.1)
        >>> [round(rise.learning_rate_factor(step, 100), 2) for step in (0, 4, 10, 55, 99)]
        [0.1, 0.5, 1.0, 0.5, 0.0]
        """
        start = self.lr_warmup * total
        if step < start:
            return min(1.0, (step + 1) / start)
        if not self.cosine:
            return 1.0
        return (1 + math.cos(math.pi * (step - start) / (total - start))) / 2
