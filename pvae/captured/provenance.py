"""Keeps the notes of Pyro's `TraceGraph_ELBO` on tensors that have no data.

Pyro notes from which sites a tensor comes: such a tensor is of a class of its own. A tensor without
data cannot be of that class; here it has the same note as an attribute.
"""

from typing import Any

from pvae.captured import private
from pvae.captured.private import pytree

_NONE: frozenset[str] = frozenset()


def noted(given: Any, results: Any) -> Any:
    """Returns the results, with the notes of all tensors in `given`."""
    notes = _NONE.union(*(getattr(t, "_provenance", _NONE) for t in pytree.tree_leaves(given)))
    if notes:
        for t in pytree.tree_leaves(results):
            if isinstance(t, private.FakeTensor):
                t._provenance, t._without = notes, None
    return results


def _track(t: Any, provenance: frozenset[str]) -> Any:
    without, notes = _extract(t)
    tracked = without.view_as(without)
    tracked._provenance, tracked._without = notes | provenance, without
    return tracked


def _extract(t: Any) -> tuple[Any, frozenset[str]]:
    notes = getattr(t, "_provenance", _NONE)
    if not notes:
        return t, notes
    without = t._without
    if without is None:
        without = t.view_as(t)
        without._provenance = _NONE
    return without, notes


if not private.MISSING:
    private.provenance.track_provenance.register(private.FakeTensor)(_track)
    private.provenance.extract_provenance.register(private.FakeTensor)(_extract)
