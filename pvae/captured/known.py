"""The values of masks that depend on no input, such as that of a lower triangle.

A traced tensor has no data, so the shape of `x[mask]` is unknown. But a mask that is made of
numbers alone has the same values at every call. They are computed while the programs are traced,
and the numbers of its true elements take the place of the mask.
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
_SHAPES = ("view", "reshape", "unsqueeze", "expand", "tril", "triu", "bool", "long", "__getitem__")
_STEPS = frozenset((*_COMPARISONS, *_LOGIC, *_ARITHMETIC, *_SHAPES))


class Known:
    """The known values of some traced tensors."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}  # keeps tensors alive: ids are unique

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Computes the value of a result of torch's function `func`, if it can be known."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._values.pop(id(given[0]) if given else 0, None)  # written in place
            return
        is_known = func in _SOURCES if not given else name in _STEPS
        if not (is_known and all(id(t) in self._values for t in given)):
            return
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: self._values[id(t)][1], (args, kwargs)
        )
        with private.without_modes():
            self._values[id(result)] = result, func(*args, **kwargs)

    def index(self, index: Any) -> Any:
        """Returns an index with numbers in place of known masks: `x[i, j]` for `x[mask]`."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            rows = self._rows(part)
            parts += (torch.tensor(row, device=part.device) for row in rows) if rows else [part]
        return tuple(parts) if isinstance(index, tuple) or len(parts) > 1 else parts[0]

    def _rows(self, mask: Any) -> list[list[int]]:
        """Returns the numbers of the true elements, a row for each dimension; [] if unknown."""
        _, value = self._values.get(id(mask), (None, None))
        if value is None or value.dtype != torch.bool:
            return []
        with private.without_modes():
            return value.nonzero().T.tolist() if value.any() else []
