"""Variational autoencoders as probabilistic programs, trained by Pyro's SVI."""

from pvae.builder import build as build
from pvae.checkpoint import load as load, save as save
from pvae.conditional import (
    ConcatLabel as ConcatLabel,
    ConcatVector as ConcatVector,
    Conditional as Conditional,
    Masked as Masked,
    concat_mask as concat_mask,
    ignore_label as ignore_label,
)
from pvae.objectives import part_of_batch as part_of_batch, temper as temper
from pvae.optim import SingleOptimizer as SingleOptimizer
from pvae.programs import (
    Guide as Guide,
    HierarchicalGuide as HierarchicalGuide,
    HierarchicalModel as HierarchicalModel,
    LabelGuide as LabelGuide,
    LabelModel as LabelModel,
    LadderGuide as LadderGuide,
    Model as Model,
)
from pvae.vae import VAE as VAE

__version__ = "0.2.0"
