"""A function of tensors, traced once and compiled: for evaluation, which has no optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pvae.captured.capturing import Capturing, Signature, resolution, tried
from pvae.captured.tracing import (
    Compiler,
    Leaves,
    NotCaptured,
    Run,
    compiled,
    inductor,
    layout,
    touched,
)


class _Graph(NamedTuple):
    """One captured call, what else it is called with, and how its results are put together."""

    run: Run
    rest: list[Tensor]
    layouts: list[Any]  # of rest
    structure: pytree.TreeSpec

    def fits(self) -> bool:
        return [layout(t) for t in self.rest] == self.layouts

    def __call__(self, arguments: list[Tensor]) -> Any:
        return pytree.tree_unflatten(list(self.run(*arguments, *self.rest)), self.structure)


class Function(Capturing):
    r"""A function of tensors, captured once for each signature and then compiled code.

    The first call with a new signature (shapes, dtypes, modes, numbers among the arguments) runs
    the function as it is; the next captures, and holds every result against the function's own at
    the same noise before the graph is used. Results have no history of gradients; the function may
    take gradients inside (`torch.autograd.grad`), but must not leave any on a parameter. What
    cannot be captured runs as it is, with one warning that says why (`engine`, `reason`).

    Args:
        function: takes tensors, numbers and strings; returns tensors, alone or in tuples, lists,
            named tuples and dictionaries.
        modules: those that it calls; a change of their mode or of their tensors makes a new graph.
        strict, after, max_graphs, compiler: as `captured.SVI`.

    Raises:
        ValueError: `after` or `max_graphs` is below 1.
        NotCaptured: by a call, with `strict`.

    >>> from pvae import captured
    >>> norm = captured.Function(lambda x: (x * x).sum().sqrt(), compiler=captured.as_traced)
    >>> for x in (torch.ones(4), torch.ones(4), 2 * torch.ones(4)):
    ...     print(norm(x).item(), norm.engine)
    2.0 eager
    2.0 eager
    4.0 captured
    """

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

    def _captured(self, graph: _Graph, signature: Signature, args: Any, kwargs: Any) -> Any:
        if not graph.fits():
            del self._graphs[signature.key]
            return self._eager(args, kwargs)
        self.engine, self.reason = "captured", None
        return graph(signature.tensors)

    def _as_it_is(self, args: Any, kwargs: Any) -> Any:
        return self._eager(args, kwargs)

    def _after(self, outcome: Any) -> Any:
        return outcome

    def _try(self, graph: _Graph, arguments: list[Tensor]) -> Any:
        return tried(lambda: graph(arguments), (*arguments, *graph.rest))

    def _agree(self, graph: _Graph, by_graph: Any, outcome: Any) -> bool:
        return _same(pytree.tree_leaves(by_graph), pytree.tree_leaves(outcome))

    def _graph(self, arguments: list[Tensor], args: Any, kwargs: Any) -> _Graph:
        results, found = touched(lambda: self.function(*args, **kwargs))
        leaves, structure = pytree.tree_flatten(results)
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if others:
            raise NotCaptured(f"the function returns a {type(others[0]).__name__}, not a tensor")
        known = {id(t) for t in arguments}
        rest = [t for t in found if id(t) not in known]

        def flat(leaves: Leaves) -> list[Tensor]:
            results = self.function(*args, **kwargs)
            return [t.detach().clone() for t in pytree.tree_leaves(results)]

        run = compiled(flat, [*arguments, *rest], self.compiler)
        return _Graph(run, rest, [layout(t) for t in rest], structure)


def _same(by_graph: list[Tensor], by_function: list[Tensor]) -> bool:
    """Whether the results are the same up to half of their digits."""
    return len(by_graph) == len(by_function) and all(
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        for ours, theirs, tolerance in zip(
            by_graph, by_function, [resolution([t]) for t in by_function], strict=True
        )
    )
