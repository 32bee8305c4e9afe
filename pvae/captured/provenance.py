"""What Pyro's `TraceGraph_ELBO` knows of its tensors, kept while they have no data.

Pyro makes a tensor of a class of its own that notes from which sites it comes. A tensor without
data cannot be of that class; here it carries the same note as an attribute.
"""

from typing import Any

from pvae.captured import private
from pvae.captured.private import pytree

_NONE: frozenset[str] = frozenset()


def noted(given: Any, results: Any) -> Any:
    """The results, with all notes of what they were computed from."""
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
