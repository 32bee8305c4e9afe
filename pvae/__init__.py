"""Variational autoencoders as probabilistic programs, trained by Pyro's SVI."""

from pvae.checkpoint import load
from pvae.conditional import ConcatLabel, ConcatVector, Conditional, ignore_label
from pvae.objectives import temper
from pvae.optim import SingleOptimizer
from pvae.programs import Guide, Model
from pvae.vae import VAE, build

__all__ = [
    "VAE",
    "ConcatLabel",
    "ConcatVector",
    "Conditional",
    "Guide",
    "Model",
    "SingleOptimizer",
    "build",
    "ignore_label",
    "load",
    "temper",
]
