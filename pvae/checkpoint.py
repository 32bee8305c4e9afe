"""Checkpoints: written atomically, read safely (tensors and plain values only).

Format 2 keeps a `Recipe`; format 1, of version 0.1, kept the arguments of its `build`, and is
brought into the form of today when it is read.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pvae.builder import NETS, PRIORS, Recipe, compose
from pvae.files import write_atomically
from pvae.vae import VAE

FORMAT = 2


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a mapping of tensors and plain values, atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint without running any code of it, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of this package.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # whatever torch, zipfile or the unpickler says of a damaged file
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise ValueError(f"{path} is not a checkpoint of this version of pvae (format {FORMAT})")
    return _from_format_1(state) if state["format"] == 1 else state


def _from_format_1(state: dict[str, Any]) -> dict[str, Any]:
    for row in state.get("history", []):
        row["train_objective"] = row.pop("train_elbo")
    old = state.get("recipe")
    if old is not None:
        old["event_shape"] = tuple(old.pop("image_shape"))
        top = old.pop("top_dim")
        old["latent_dims"] = (old.pop("latent_dim"), *(() if top is None else (top,)))
        # these were kept with parts that have no use for them too
        if NETS[old["net"]].hidden is None and top is None:
            old["hidden"] = None
        if PRIORS[old["prior"]].components is None:
            old["components"] = None
    return state


def pair_state(vae: VAE) -> dict[str, Any]:
    """What a pair is, as tensors and plain values.

    >>> import pvae
    >>> pair_state(pvae.build((1, 8, 8), latent_dim=2))["recipe"]["latent_dims"]
    (2,)
    """
    recipe = None if vae.recipe is None else asdict(vae.recipe)
    return {"model": vae.state_dict(), "recipe": recipe}


def save(vae: VAE, path: str | os.PathLike[str], notes: Mapping[str, float] | None = None) -> None:
    """Saves a pair with its recipe, so that `load` builds it again; `notes` are kept beside it.

    >>> import pvae, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pvae.save(pvae.build((1, 8, 8), latent_dim=2), f"{folder}/digits.pt")
    ...     pvae.load(f"{folder}/digits.pt").recipe.latent_dims
    (2,)
    """
    write(path, {**pair_state(vae), **(notes or {})})


def restore(module: nn.Module, state: Mapping[str, Tensor], source: object = "state") -> None:
    """Loads parameters and buffers into `module`, all of them or, on any mismatch, none.

    Raises:
        ValueError: the state is of another architecture; it names the tensors that differ.

    >>> restore(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "net.pt")
    Traceback (most recent call last):
    ValueError: net.pt is a checkpoint of another architecture:
      weight: (4, 2) saved, (3, 2) needed
      bias: (4,) saved, (3,) needed
    """
    own = module.state_dict()
    lines = []
    for name in [*own, *(name for name in state if name not in own)]:
        saved = tuple(state[name].shape) if name in state else "not"
        needed = tuple(own[name].shape) if name in own else "not"
        if saved != needed:
            lines.append(f"  {name}: {saved} saved, {needed} needed")
    if lines:
        if len(lines) > 6:
            lines[6:] = [f"  and {len(lines) - 6} more"]
        raise ValueError("\n".join([f"{source} is a checkpoint of another architecture:", *lines]))
    module.load_state_dict(state)


def load(path: str | os.PathLike[str]) -> VAE:
    """Builds again the VAE saved in a checkpoint or a run folder (its best model), in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of a VAE made by `build`.
    """
    file = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    state = read(file)
    if not isinstance(state.get("recipe"), dict):
        raise ValueError(
            f"{file} holds no recipe: its VAE was composed by hand; build it again, and hand the "
            "state to pvae.checkpoint.restore"
        )
    try:
        vae = compose(Recipe(**state["recipe"]))
    except TypeError as error:
        raise ValueError(f"{file} was written by another version of pvae: {error}") from error
    restore(vae, state["model"], file)
    return vae.eval()
