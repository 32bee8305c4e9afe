"""The values of traced tensors that depend on no input: masks, and the indices of a plate.

A traced tensor has no data, so the shape of `x[mask]` is unknown. But a mask that is made of
numbers alone, such as that of a lower triangle, has the same values at every call. They are
computed while the programs are traced, and the numbers of its true elements take the place of the
mask. In the same way `i.item()` is a number for an index `i` of a whole plate.
"""

from typing import Any

import torch
from torch import Tensor

from pvae.captured import private
from pvae.captured.private import pytree

_SOURCES = (torch.arange, torch.eye, torch.full, torch.ones, torch.tensor, torch.zeros)
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "__eq__", "__ne__")
_LOGIC = ("__and__", "__or__", "__invert__", "logical_and", "logical_not", "logical_or")
_ARITHMETIC = ("add", "sub", "mul", "remainder", "__rsub__")
_SHAPES_AND_DTYPES = (
    "view",
    "reshape",
    "unsqueeze",
    "expand",
    "tril",
    "triu",
    "__getitem__",
    "to",
    "bool",
    "long",
)
_STEPS = frozenset((*_COMPARISONS, *_LOGIC, *_ARITHMETIC, *_SHAPES_AND_DTYPES))


class Known:
    """The known values of some traced tensors."""

    def __init__(self) -> None:
        # by id: the tensor, which is kept alive; its version then; and its value
        self._values: dict[int, tuple[Tensor, int, Tensor]] = {}

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Computes the value of a result of torch's function `func`, if it can be known."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        is_known = getattr(func, "__name__", "") in _STEPS if given else func in _SOURCES
        if not (is_known and all(self.value(t) is not None for t in given)):
            return
        args, kwargs = pytree.tree_map_only(Tensor, self.value, (args, kwargs))
        if isinstance(result, Tensor):
            with private.without_modes():
                self._values[id(result)] = result, result._version, func(*args, **kwargs)

    def value(self, t: Any) -> Tensor | None:
        """Returns the value of a tensor; None if it is unknown, as after a write in place."""
        held, version, value = self._values.get(id(t), (None, 0, None))
        return value if held is not None and held._version == version else None

    def number(self, t: Tensor) -> Any:
        """Returns the value of a tensor as a number; None if it is unknown."""
        value = self.value(t)
        with private.without_modes():
            return None if value is None else value.item()

    def index(self, index: Any) -> Any:
        """Returns an index with numbers in place of known masks: `x[i, j]` for `x[mask]`."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            rows = self._rows(part)
            parts += (torch.tensor(row, device=part.device) for row in rows) if rows else [part]
        return tuple(parts) if isinstance(index, tuple) or len(parts) > 1 else parts[0]

    def _rows(self, mask: Any) -> list[list[int]]:
        """Returns the numbers of the true elements, a row for each dimension; [] if unknown."""
        value = self.value(mask)
        if value is None or value.dtype != torch.bool:
            return []
        with private.without_modes():
            return value.nonzero().T.tolist() if value.any() else []
