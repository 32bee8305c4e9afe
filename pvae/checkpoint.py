"""Checkpoints: written atomically, read safely (tensors and plain values only)."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pvae.builder import build
from pvae.files import write_atomically
from pvae.vae import VAE

FORMAT = 1


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Saves a mapping of tensors and plain values, atomically."""
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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of pvae (format {FORMAT})")
    return state


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
            f"{file} holds no recipe: its VAE was composed by hand; build it and use restore"
        )
    vae = build(**state["recipe"])
    restore(vae, state["model"], file)
    return vae.eval()
