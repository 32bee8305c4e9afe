"""Traces a function of tensors once and compiles it: for evaluation, which has no optimizer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pvae.captured.capturing import Capturing, Entry, Graph
from pvae.captured.compiling import Compiler, NotCaptured, inductor
from pvae.captured.moment import resolution
from pvae.captured.private import pytree
from pvae.captured.seen import layout
from pvae.captured.tracing import Leaves, compiled, touched


@dataclasses.dataclass(kw_only=True)
class _Graph(Graph):
    """One captured call of a function."""

    structure: Any  # of the results

    def __call__(self, inputs: list[Tensor]) -> Any:
        return pytree.tree_unflatten(list(self.run(*inputs, *self.rest)), self.structure)


class Function(Capturing):
    r"""A function of tensors, captured once for each signature and then run as compiled code.

    The first call with a new signature (shapes, dtypes, modes, and other values that the function
    reads) runs the function itself. The next one makes a graph, and compares every result with the
    function's own at the same noise before the graph is used; later calls are compared as those of
    `captured.SVI`. Results have no history of gradients. The function may take gradients inside
    (`torch.autograd.grad`), but must not leave any on a parameter. If it cannot be captured, the
    function itself runs, with one warning that says why (`engine`, `reason`).

    Args:
        function: takes tensors, numbers and strings; returns tensors, alone or in tuples, lists,
            named tuples and dictionaries.
        modules: those that it calls; a new mode, or a new parameter object, makes a new graph.
        strict, after, max_graphs, compiler: as `captured.SVI`.

    Raises:
        ValueError: `after` or `max_graphs` is below 1.
        NotCaptured: with `strict`, by a call that cannot be captured.

    >>> from pvae import captured
    >>> norm = captured.Function(lambda x: (x * x).sum().sqrt(), compiler=captured.as_traced)
    >>> for x in (torch.ones(4), torch.ones(4), 2 * torch.ones(4)):
    ...     print(norm(x).item(), norm.engine)
    2.0 eager
    2.0 eager
    4.0 captured
    """

    _programs = ("function",)
    _captures_of = "function"

    def __init__(
        self,
        function: Callable[..., Any],
        modules: Sequence[nn.Module] = (),
        *,
        strict: bool = False,
        after: int = 1,
        max_graphs: int = 8,
        compiler: Compiler = inductor,
    ) -> None:
        super().__init__(
            modules, strict=strict, after=after, max_graphs=max_graphs, compiler=compiler
        )
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def _eager(self, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.detach, self.function(*args, **kwargs))

    def _replay(self, entry: Entry, inputs: list[Tensor]) -> Any:
        return entry.graph(inputs)

    def _reference(self, leaves: list[Tensor], args: Any, kwargs: Any) -> Any:
        return self._eager(args, kwargs)

    def _repeats(self, again: Any, outcome: Any) -> bool:
        return _same(pytree.tree_leaves(again), pytree.tree_leaves(outcome))

    def _difference(
        self, graph: _Graph, by_graph: Any, outcome: Any, moved: list[Any]
    ) -> str | None:
        results = pytree.tree_leaves(by_graph)
        same = any(_same(results, pytree.tree_leaves(other)) for other in (outcome, *moved))
        return None if same else "a result"

    def _make(self, inputs: list[Tensor], args: Any, kwargs: Any) -> _Graph:
        results, found, _ = touched(lambda: self.function(*args, **kwargs))
        leaves, structure = pytree.tree_flatten(results)
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if others:
            raise NotCaptured(f"the function returns a {type(others[0]).__name__}, not a tensor")
        known = {id(t) for t in inputs}
        rest = [t for t in found if id(t) not in known]

        def flat(leaves: Leaves) -> list[Tensor]:
            results = self.function(*args, **kwargs)
            return [t.detach().clone() for t in pytree.tree_leaves(results)]

        run = compiled(flat, [*inputs, *rest], self.compiler)
        layouts = [layout(t) for t in rest]
        return _Graph(run=run, rest=rest, layouts=layouts, structure=structure)


def _same(by_graph: list[Tensor], by_function: list[Tensor]) -> bool:
    """Returns whether the results agree in half of their digits."""
    return len(by_graph) == len(by_function) and all(
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        for ours, theirs, tolerance in zip(
            by_graph, by_function, [resolution([t]) for t in by_function], strict=True
        )
    )
