"""Saves and restores what a call changes: the values of tensors, and random states."""

import contextlib
import itertools
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor


class Moment:
    """A copy of the values of some tensors, and of the state of torch's generators."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self._values = [t.detach().clone() for t in tensors]
        on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._random = [torch.get_rng_state(), *on_cuda]

    def put_back(self) -> None:
        with torch.no_grad():
            for t, value in zip(self.tensors, self._values, strict=True):
                if not _equal(t, value):  # the user's tensor may be read-only
                    t.copy_(value)
        torch.set_rng_state(self._random[0])
        if self._random[1:]:
            torch.cuda.set_rng_state_all(self._random[1:])

    def changed(self) -> Tensor | None:
        """Returns the first tensor whose values are others now; None if there is none."""
        pairs = zip(self.tensors, self._values, strict=True)
        return next((t for t, value in pairs if not _close(t.detach(), value)), None)

    def difference(self, other: "Moment") -> str | None:
        """Names a difference from `other`, or returns None; half of the digits may differ."""
        for t, ours, theirs in zip(self.tensors, self._values, other._values, strict=True):
            if not _close(ours, theirs):
                return f"a tensor {tuple(t.shape)} that the programs write to"
        if not all(map(torch.equal, self._random, other._random)):
            return "the random numbers that are drawn"
        return None


def strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns each tensor once, without those that cannot be copied: sparse, or without data."""
    unique = {id(t): t for t in tensors}.values()
    return [t for t in unique if t.layout == torch.strided and not t.is_meta]


def _equal(t: Tensor, value: Tensor) -> bool:
    """Returns whether the values are the same; NaN is the same as NaN."""
    return torch.equal(t, value) or bool(((t == value) | ((t != t) & (value != value))).all())


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if torch.equal(ours, theirs):  # as most tensors are, and faster than `allclose`
        return True
    if not (ours.is_floating_point() or ours.is_complex()):
        return False
    tolerance = resolution([ours])
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def resolution(tensors: Sequence[Tensor]) -> float:
    """Returns the tolerance of a comparison: half of the digits of the arithmetic in use."""
    dtypes = [t.dtype for t in tensors if t.is_floating_point()] or [torch.get_default_dtype()]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return max([2.0**-10] * tf32 + [torch.finfo(dtype).eps for dtype in dtypes]) ** 0.5


def other_random_state(generators: Sequence[Any] = ()) -> Hashable:
    """Returns the state of Python's and NumPy's generators, and of the programs' own.

    In a graph, draws from these generators would be constants.
    """
    state = pyro.util.get_rng_state()
    own = [_taken(generator) for generator in generators]
    states = [v.tolist() if isinstance(v, Tensor) else str(v) for v in own]
    return str((state["random"], state["numpy"][1].tobytes(), state["numpy"][2:], states))


@contextlib.contextmanager
def keeping_random_state(generators: Sequence[Any] = ()) -> Iterator[None]:
    """Restores Python's and NumPy's generators, and the programs' own, after the block."""
    state = pyro.util.get_rng_state()
    own = [_taken(generator) for generator in generators]
    try:
        yield
    finally:
        pyro.util.set_rng_state({**state, "torch": torch.get_rng_state()})
        for generator, before in zip(generators, own, strict=True):
            _set(generator, before)


def _taken(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def position(iterator: Any) -> Hashable:
    """Returns how far an iterator is; a new object at each call if that cannot be known."""
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    if type(iterator) in _WITH_POSITION:
        return iterator.__length_hint__()
    return object()


_WITH_POSITION: tuple[Any, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))
