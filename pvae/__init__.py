"""Variational autoencoders as probabilistic programs, trained by Pyro's SVI."""

from pvae.builder import build
from pvae.checkpoint import load
from pvae.conditional import (
    ConcatLabel,
    ConcatVector,
    Conditional,
    Masked,
    concat_mask,
    ignore_label,
)
from pvae.objectives import temper
from pvae.optim import SingleOptimizer
from pvae.programs import (
    Guide,
    HierarchicalGuide,
    HierarchicalModel,
    LabelGuide,
    LabelModel,
    Model,
)
from pvae.vae import VAE

__all__ = [
    "VAE",
    "ConcatLabel",
    "ConcatVector",
    "Conditional",
    "Guide",
    "HierarchicalGuide",
    "HierarchicalModel",
    "LabelGuide",
    "LabelModel",
    "Masked",
    "Model",
    "SingleOptimizer",
    "build",
    "concat_mask",
    "ignore_label",
    "load",
    "temper",
]
