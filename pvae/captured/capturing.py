"""Captures calls as graphs, finds the graph of a later call, and compares it with the programs."""

import contextlib
import enum
import functools
import inspect
import operator
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor, nn

from pvae.captured import private
from pvae.captured.compiling import Compiler, NotCaptured, Run
from pvae.captured.moment import (
    Moment,
    keeping_random_state,
    other_random_state,
    position,
    resolution,
    strided,
)
from pvae.captured.private import pytree
from pvae.captured.reasons import in_words
from pvae.captured.seen import FLOATS, Seen, Spot, is_library, is_value, layout, may_vary, same
from pvae.captured.tracing import parameters, unhashable, without_onednn

_SIGNATURES = 100  # that are kept; after so many, a call with a new one runs eager
_UNREPEATED = 16  # signatures without one that came again; after so many, a warning says so
_IN_A_ROW = 4  # new entries for one key; after so many, a warning names what changes
_TRIES = 8  # runs of the programs to measure what rounding does to their results
_SOMETIMES = 1000  # captured calls; after every so many, one is compared with the programs


class Signature(NamedTuple):
    """The arguments and surroundings of a call; calls with another `key` never share a graph."""

    key: Hashable
    tensors: list[Tensor]  # of the arguments, then of the handlers around the call
    numbers: list[tuple[Spot, Tensor]]  # floats of the handlers: place, and value as a tensor
    leaves: list[Any]  # the values inside the arguments
    structure: Any  # of the arguments, without the leaves
    floats: list[tuple[int, float]]  # among the leaves: index and value

    def arguments(self, tensors: dict[int, Tensor]) -> tuple[Any, Any]:
        """Returns `(args, kwargs)`, with `tensors[i]` in place of leaf `i`."""
        leaves = [tensors.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.structure)  # new lists and dictionaries

    def kinds(self) -> list[type]:
        """Returns the classes of arguments and handlers that are not a library's."""
        found = [*map(type, self.leaves), *map(type, private.runtime._PYRO_STACK)]
        inside = [self.structure]
        while inside:
            part = inside.pop()
            inside += private.children(part)
            found += [kind for kind in (part.type, part.context) if isinstance(kind, type)]
        return [kind for kind in dict.fromkeys(found) if not is_library(kind.__module__)]

    def is_of(self, args: Any, kwargs: Any) -> bool:
        """Returns whether the arguments hold the same objects as before the call."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        are = len(leaves) == len(self.leaves) and all(map(operator.is_, leaves, self.leaves))
        return bool(are and structure == self.structure)

    def without_data(self) -> "Signature":
        """Returns the signature with the layouts of tensors in their place, for comparisons."""
        return self._replace(tensors=[], numbers=[], leaves=list(map(_fact, self.leaves)))

    def first_change_from(self, other: "Signature") -> str | None:
        """Names the first argument that differs from that in `other`, which has no data."""
        args, kwargs = self.arguments({})
        named = [*((f"args[{i}]", v) for i, v in enumerate(args)), *kwargs.items()]
        names = [name for name, value in named for _ in pytree.tree_leaves(value)]
        pairs = zip(names, self.leaves, other.leaves, strict=False)
        return next((name for name, now, then in pairs if _fact(now) != then), None)


def _fact(leaf: Any) -> Any:
    return layout(leaf) if isinstance(leaf, Tensor) else leaf


def signature_of(args: Any, kwargs: Any) -> Signature:
    """Returns the signature of a call.

    Raises:
        NotCaptured: an argument or a handler holds a value that cannot be compared, or a tensor
            requires a gradient, or the call is in `torch.inference_mode`.
    """
    leaves, structure = _flattened(args, kwargs)
    key: list[Hashable] = [structure, torch.get_default_dtype(), private.default_device()]
    key += [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]
    key.append(torch.get_float32_matmul_precision())
    for device in ("cpu", "cuda"):
        key += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    tensors: list[Tensor] = []
    first: dict[int, int] = {}  # by id: `key` tells one tensor given twice from two tensors

    def add(value: Any, where: str) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise NotCaptured(f"{where} is a tensor that requires a gradient")
            if value.is_nested:
                raise NotCaptured(f"{where} is a nested tensor")
            if vars(value):
                raise NotCaptured(f"{where} is a tensor with attributes: {', '.join(vars(value))}")
            tensors.append(value)
            key.append((layout(value), first.setdefault(id(value), len(first))))
        elif is_value(value) and (isinstance(value, enum.Enum) or not hasattr(value, "__dict__")):
            key.append((type(value), value))
        elif isinstance(value, functools.partial) and is_library(value.func.__module__):
            key.append(value.func)  # Pyro's `block` has one
            for inner in pytree.tree_leaves((value.args, value.keywords)):
                add(inner, where)
        else:
            raise NotCaptured(
                f"{where} is of type {type(value).__name__}; only tensors, numbers and strings "
                "can be told apart, alone or in lists, tuples and dictionaries"
            )

    if private.has_mode():
        raise NotCaptured("the call is inside a mode of torch that changes what its functions do")
    if torch.is_inference_mode_enabled():
        raise NotCaptured("the call is in torch.inference_mode, where nothing is traced")
    if torch.is_anomaly_enabled():
        raise NotCaptured("torch.autograd.set_detect_anomaly is on, which looks at every gradient")
    floats = [(i, float(leaf)) for i, leaf in enumerate(leaves) if isinstance(leaf, FLOATS)]
    key.append(tuple((i, type(leaves[i])) for i, _ in floats))
    for leaf in leaves:
        if not isinstance(leaf, FLOATS):
            add(leaf, "an argument")
    numbers = []
    for handler in private.runtime._PYRO_STACK:
        key.append(cast(Hashable, type(handler)))
        for name, value in vars(handler).items():
            where = f"{name} of the handler {type(handler).__name__} around the step"
            if type(value) is float:
                number = as_tensor(value, torch.float64, tensors)
                numbers.append((Spot(vars(handler), name, where), number))
                add(number, where)
            else:
                add(value, where)
    try:
        hash(tuple(key))
    except TypeError as error:  # the structure may hold an object that cannot be hashed
        raise NotCaptured(f"the arguments cannot be told apart: {error}") from error
    return Signature(tuple(key), tensors, numbers, leaves, structure, floats)


def _flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Returns the same as `tree_flatten`, but faster if all arguments are plain tensors."""
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return list(args), _row(len(args))
    return pytree.tree_flatten((args, kwargs))


@functools.cache
def _row(count: int) -> Any:
    """Returns the structure of `count` tensors as arguments."""
    return pytree.tree_flatten(((0,) * count, {}))[1]


def as_tensor(value: float, dtype: torch.dtype, beside: Sequence[Tensor]) -> Tensor:
    """Returns a number as a tensor `()` on the GPU, if the call has a tensor there.

    The tensor is filled on the GPU. A copy from the host would wait for the GPU, and a CUDA graph
    would repeat the first value.
    """
    held = (*beside, *parameters().values()) if torch.cuda.is_initialized() else ()
    device = next((t.device for t in held if t.is_cuda), torch.device("cpu"))
    return torch.full((), value, dtype=dtype, device=device)


@contextlib.contextmanager
def as_tensors(numbers: Sequence[tuple[Spot, Tensor]], before: Sequence[float]) -> Iterator[None]:
    """Puts the tensors in the places of the numbers inside the block; after it, `before` again."""
    try:
        for spot, number in numbers:
            spot.put(number)
        yield
    finally:
        for (spot, _), value in zip(numbers, before, strict=True):
            spot.put(value)


def submodules(program: Any) -> list[nn.Module]:
    """Returns all modules of a program that is an `nn.Module` or its method; else an empty list."""
    module = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return list(module.modules()) if isinstance(module, nn.Module) else []


@contextlib.contextmanager
def called(modules: dict[nn.Module, None]) -> Iterator[None]:
    """Adds every module that is called inside the block to `modules`."""
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: modules.setdefault(module)
    )
    try:
        yield
    finally:
        hook.remove()


@dataclass(kw_only=True)
class Graph:
    """One captured call. `run` takes the inputs of the call, then `tensors`."""

    run: Run
    rest: list[Tensor]  # tensors that the programs read, and that are not inputs
    layouts: Sequence[Hashable]  # of `tensors`
    places: list[int | None] = field(default_factory=list)  # of rest, in `Seen`

    @property
    def tensors(self) -> list[Tensor]:
        return self.rest

    def bind_to(self, seen: Seen) -> None:
        """Notes the place of each tensor of the rest in `seen`, from which `bind` takes it."""
        self.places = [seen.place_of(t) for t in self.rest]

    def bind(self, seen: Seen) -> bool:
        """Takes the tensors of this call; returns whether the graph fits them."""
        for i, place in enumerate(self.places):
            if place is not None:
                self.rest[i] = seen.tensors[place]
        return [layout(t) for t in self.tensors] == self.layouts


@dataclass
class Entry:
    """Calls with one signature and one state of what the programs read, and their graph."""

    seen: Seen  # what the programs read
    among: list[int | None]  # index of each tensor of the signature in `seen.tensors`
    floats: list[tuple[int, float]]  # among the arguments: index and value
    free: list[int] = field(default_factory=list)  # indices of those that may change
    runs: int = 0  # eager calls
    graph: Any = None
    refused: str | None = None  # why it cannot be captured
    replays: int = 0  # calls by the graph
    dtype: torch.dtype = torch.float64  # of the inputs that are numbers
    trusted: int = 0  # `replays` at the last comparison with the programs

    def fits(self, signature: Signature) -> bool:
        return (
            self.seen.holds()
            and places(self.seen, signature) == self.among
            and all(
                (may_vary(now, then) if i in self.free else same(now, then))
                for (i, now), (_, then) in zip(signature.floats, self.floats, strict=True)
            )
        )

    def inputs(self, signature: Signature) -> list[Tensor]:
        """Returns the inputs of the graph: tensors, then numbers that may change."""
        beside = signature.tensors
        numbers = [value for i, value in signature.floats if i in self.free]
        numbers += [value for _, value in self.seen.numbers()]
        return [*beside, *(as_tensor(value, self.dtype, beside) for value in numbers)]


def places(seen: Seen, signature: Signature) -> list[int | None]:
    """Returns for each tensor of the signature its index in `seen.tensors`, or None."""
    return [seen.place_of(t) for t in signature.tensors]


class Capturing:
    """Calls that run eager at first, are captured once for each signature, and then run by a graph.

    A subclass defines these methods:

    - `_eager` runs a call without a graph.
    - `_reference` runs a call without a graph, but only the programs. `_repeats` returns whether
      two runs agree.
    - `_make` makes a graph.
    - `_finish` and `_accept` do the rest of a call after the programs or a graph have run (for SVI,
      the optimizer's part), and return what the call returns.
    - `_difference` names a result in which graph and programs differ. It also gets the outcomes of
      the programs with parameters that were moved by their last digits.
    - `_replay` does a whole call by a graph.

    A graph takes its inputs and also its `tensors`. `bind_to` notes in which places the programs
    read these tensors, and `bind` takes the tensors that are in the places now.
    """

    _programs: Sequence[str]  # names of the attributes that hold the programs
    _captures_of: str  # what messages call the programs

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        strict: bool,
        after: int,
        max_graphs: int,
        compiler: Compiler,
    ) -> None:
        for name, value in (("after", after), ("max_graphs", max_graphs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.strict, self.after, self.max_graphs = strict, after, max_graphs
        self.compiler = compiler
        self.engine = "eager"
        self.reason: str | None = None
        self._modules = dict.fromkeys(modules)
        self._begin()

    def _begin(self) -> None:
        """Forgets all graphs, and all that is known of the programs."""
        self.captures = 0  # how often a capture was tried
        self._entries: dict[Hashable, list[Entry]] = {}
        self._signatures = 0  # entries that were made
        self._last: Signature | None = None  # of those entries
        self._crowded: str | None = None  # why no more graphs are made
        self._kinds: dict[type, None] = {}  # of arguments and of handlers around a call
        # places of numbers that could not be made inputs of a graph, and why not
        self._frozen: list[tuple[Spot, str]] = []
        self._frozen_floats: set[int] = set()  # the same, for indices of arguments
        self._distrusted: str | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the graphs: a copy, or an object that `pickle` reads, captures again."""
        other = Capturing.__new__(type(self))
        other.__dict__.update(vars(self))
        other._begin()
        return vars(other)

    def _eager(self, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _reference(self, leaves: list[Tensor], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _finish(self, outcome: Any) -> Any:
        return outcome

    def _repeats(self, again: Any, outcome: Any) -> bool:
        raise NotImplementedError

    def _make(self, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _accept(self, graph: Any, by_graph: Any) -> Any:
        return by_graph

    def _difference(self, graph: Any, by_graph: Any, outcome: Any, moved: list[Any]) -> str | None:
        raise NotImplementedError

    def _replay(self, entry: Entry, inputs: list[Tensor]) -> Any:
        raise NotImplementedError

    # ---- one call ----

    def _call(self, args: Any, kwargs: Any) -> Any:
        self.engine, self.reason = "eager", None
        try:
            signature = self._signature(args, kwargs)
        except NotCaptured as error:
            self._refuse(str(error))
            return self._eager(args, kwargs)
        entries = self._entries.get(signature.key, [])
        entry = next((e for e in entries if e.fits(signature)), None)
        if entry is not None and entry.graph is not None:
            if entry is not entries[0]:
                entries.remove(entry)
                entries.insert(0, entry)
            return self._by_graph(entry, signature, args, kwargs)
        if entry is not None and entry.refused:
            self.reason = entry.refused
            return self._eager(args, kwargs)
        if self.captures >= self.max_graphs or self._signatures >= _SIGNATURES:
            if self._crowded is None:
                self._crowded = self._too_many(entries, signature)
                self._drop_untried()
            self._refuse(self._crowded)
            return self._eager(args, kwargs)
        if entry is None and (always := self._always_new(entries)):
            self._refuse(always)
        elif entry is None and not self.captures and self._signatures == _UNREPEATED:
            self._refuse(self._too_many(entries, signature))
        if entry is None or entry.runs < self.after:
            with called(self._modules):
                result = self._eager(args, kwargs)
            try:
                self._count(signature)
            except NotCaptured as error:
                self._distrusted = str(error)
                self._refuse(self._distrusted)
            return result
        return self._capture(entry, signature, args, kwargs)

    def _signature(self, args: Any, kwargs: Any) -> Signature:
        if self._distrusted:
            raise NotCaptured(self._distrusted)
        private.check()
        return signature_of(args, kwargs)

    def _count(self, signature: Signature) -> None:
        """Counts an eager call after it has run, when all modules that it calls are known."""
        entries = self._entries.setdefault(signature.key, [])
        entry = next((e for e in entries if e.fits(signature)), None)
        if entry is None:
            entry = self._entry(signature)
            self._signatures += 1
            self._last = signature.without_data()
            self._let_vary(entry, entries)
            entries.append(entry)
        entry.runs += 1

    def _entry(self, signature: Signature) -> Entry:
        self._kinds.update(dict.fromkeys(signature.kinds()))
        seen = self._look()
        seen.forget()
        return Entry(seen, places(seen, signature), signature.floats)

    def _look(self) -> Seen:
        try:
            return Seen(vars(self), self._programs, [*self._modules, *self._kinds])
        except NotCaptured:
            raise
        except Exception as error:  # an object may raise anything when its attributes are read
            why = f"what the programs read cannot be looked up: {in_words(error)}"
            raise NotCaptured(why) from error

    def _drop_untried(self) -> None:
        """Forgets the calls that will never get a graph: looking them up takes time."""
        for key, entries in list(self._entries.items()):
            entries[:] = [e for e in entries if e.graph is not None or e.refused]
            if not entries:
                del self._entries[key]

    def _let_vary(self, entry: Entry, others: list[Entry]) -> None:
        """If only numbers differ from another entry, makes them inputs of the graph of `entry`."""
        for other in others:
            varying = entry.seen.vary_from(other.seen)
            if varying is None or entry.among != other.among:
                continue
            spots = [entry.seen.spot(place) for place in varying]
            pairs = zip(entry.floats, other.floats, strict=True)
            free = [i for (i, now), (_, then) in pairs if now != then]
            frozen = any(spot.is_at(f) for spot in spots for f, _ in self._frozen)
            if (varying or free) and not frozen and not self._frozen_floats.intersection(free):
                entry.seen.varying = [*{*varying, *other.seen.varying}]
                entry.free = [*{*free, *other.free}]
                if other.graph is None:
                    others.remove(other)
                return

    def _always_new(self, entries: Sequence[Entry]) -> str | None:
        """Says what changes at every call if the last `_IN_A_ROW` calls were all new; else None."""
        last = entries[-_IN_A_ROW:]
        if len(last) < _IN_A_ROW or any(e.runs > 1 or e.refused or e.graph for e in last):
            return None
        names = dict.fromkeys(last[-1].seen.first_change_from(e.seen) for e in last[:-1])
        named = ", ".join("a number among the arguments" if n is None else f"`{n}`" for n in names)
        why = self._frozen[-1][1] if self._frozen else ""
        return f"{named} changes at every call, and is not a tensor{why}"

    def _too_many(self, entries: Sequence[Entry], signature: Signature) -> str:
        name = None if self._last is None else signature.first_change_from(self._last)
        if name is None and entries:
            with contextlib.suppress(NotCaptured):
                name = self._look().first_change_from(entries[-1].seen)
        changed = "" if name is None else f" (`{name}` has changed)"
        return (
            f"{self.captures} captures were tried for {self._signatures} different calls{changed}; "
            "a number that changes from step to step should be a tensor, shapes should repeat, and "
            "texts should not be arguments"
        )

    def _by_graph(self, entry: Entry, signature: Signature, args: Any, kwargs: Any) -> Any:
        inputs = entry.inputs(signature)
        graph = entry.graph
        if not graph.bind(entry.seen):  # as after `clear_param_store`: run the programs
            entry.graph = None
            return self._eager(args, kwargs)
        self.engine, self.reason = "captured", None
        done = entry.replays
        entry.replays += 1
        if is_due(done):
            return self._checked(entry, inputs, args, kwargs)
        return self._replay(entry, inputs)

    # ---- capturing ----

    def _capture(self, entry: Entry, signature: Signature, args: Any, kwargs: Any) -> Any:
        """Runs the call eagerly, and makes a graph that is compared with it at the same noise."""
        try:
            seen = self._look()
        except NotCaptured as error:
            entry.refused = str(error)
            self._refuse(entry.refused)
            return self._eager(args, kwargs)
        outcome, end = self._captured(entry, seen, signature, args, kwargs)
        end.put_back()
        if entry.refused:
            self._refuse(entry.refused)
        return self._finish(outcome)

    def _captured(
        self, entry: Entry, seen: Seen, signature: Signature, args: Any, kwargs: Any
    ) -> tuple[Any, Moment]:
        """Runs the programs, and gives `entry` a graph or the reason why there is none.

        Returns the outcome of the programs, and the moment after it.
        """
        self.captures += 1
        seen.vary_as(entry.seen)
        entry.seen, entry.among, entry.floats = seen, places(seen, signature), signature.floats
        start = self._moment([*signature.tensors, *seen.tensors])
        store = _store()
        elsewhere = other_random_state(seen.generators)
        positions = [position(iterator) for _, iterator in seen.iterators]
        outcome = self._reference(leaves_of(start), args, kwargs)
        end = Moment(start.tensors)
        changes = seen.changes()
        drawn_from = [
            n for (n, i), at in zip(seen.iterators, positions, strict=True) if position(i) != at
        ]
        if seen.clocks:
            entry.refused = (
                f"the programs ask for the time, or for the system's random numbers, by "
                f"`{seen.clocks[0]}`"
            )
        elif drawn_from:
            entry.refused = f"the programs can draw from the iterator `{drawn_from[0]}`"
        elif changes:
            entry.refused = f"the programs change `{changes[0]}` at every call"
        elif not signature.is_of(args, kwargs):
            entry.refused = "the programs change the lists or dictionaries that are their arguments"
        elif other_random_state(seen.generators) != elsewhere:
            entry.refused = (
                "random numbers of Python or NumPy, or of a generator of one's own, are drawn"
            )
        elif new := [name for name, _ in _store() ^ store]:
            entry.refused = f"the programs change {min(new)!r} in Pyro's store at this call"
        else:
            entry.refused = self._try_to_capture(entry, signature, start, end, outcome)
        seen.forget()
        return outcome, end

    def _try_to_capture(
        self,
        entry: Entry,
        signature: Signature,
        start: Moment,
        end: Moment,
        outcome: Any,
    ) -> str | None:
        """Makes the graph of `entry` and compares it with `outcome`; returns why it is refused."""
        varying = entry.seen.numbers()
        either = varying or entry.free
        dtypes = [torch.float64, torch.get_default_dtype()] if either else [torch.float64]
        for dtype in dict.fromkeys(dtypes):
            entry.dtype = dtype
            reason = self._attempt(entry, signature, start, end, outcome)
            if not reason:
                return None
        if either:  # once more, with the numbers as constants
            nowhere = Spot(None, None, "an argument")
            for spot in [spot for spot, _ in varying] or [nowhere]:
                self._frozen.append((spot, f"; with a tensor in its place, {reason}"))
            self._frozen_floats.update(entry.free)
            entry.seen.varying, entry.free = [], []
            reason = self._attempt(entry, signature, start, end, outcome)
        return reason

    def _attempt(
        self,
        entry: Entry,
        signature: Signature,
        start: Moment,
        end: Moment,
        outcome: Any,
    ) -> str | None:
        seen, inputs = entry.seen, entry.inputs(signature)
        varying = seen.numbers()
        before = [*(spot_value(spot) for spot, _ in signature.numbers), *(v for _, v in varying)]
        numbers = iter(inputs[len(signature.tensors) :])
        free = {i: next(numbers) for i, _ in signature.floats if i in entry.free}
        args, kwargs = signature.arguments(free)
        own = [(spot, next(numbers)) for spot, _ in varying]
        try:
            start.put_back()
            with keeping_random_state(seen.generators):
                try:
                    with (
                        unhashable(inputs[len(signature.tensors) :]),
                        as_tensors([*signature.numbers, *own], before),
                    ):
                        graph = self._make(inputs, args, kwargs)
                finally:
                    seen.put_back()
                graph.bind_to(seen)
                start.put_back()
                known = set(map(id, start.tensors))
                unseen = Moment(strided(t for t in graph.tensors if id(t) not in known))
                by_graph = graph(inputs)
            try:
                if (written := unseen.changed()) is not None:
                    return (
                        f"the programs write to a tensor {tuple(written.shape)} in a place that "
                        "is not looked up"
                    )
                difference = self._unlike(start, graph, by_graph, outcome, args, kwargs)
                difference = difference or Moment(end.tensors).difference(end)
            finally:
                unseen.put_back()
        except Exception as error:  # tracer and compiler may raise anything
            return in_words(error)
        if difference:
            return f"the graph and the {self._captures_of} differ in {difference}"
        entry.graph, entry.replays, entry.trusted = graph, 0, 0
        return None

    def _moment(self, tensors: Sequence[Tensor]) -> Moment:
        return Moment(strided([*tensors, *parameters().values()]))

    def _checked(self, entry: Entry, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Does a call by the graph and by the programs, and compares the two.

        If they differ, the call is that of the programs, and no graph is used any more.
        """
        graph = entry.graph
        start = self._moment([*inputs, *graph.tensors])
        elsewhere = other_random_state(entry.seen.generators)
        with pyro.validation_enabled(False):  # as in all captured calls
            outcome = self._reference(leaves_of(start), args, kwargs)
        end = Moment(start.tensors)
        changes = entry.seen.changes()
        start.put_back()
        by_graph = graph(inputs)
        difference = self._unlike(start, graph, by_graph, outcome, args, kwargs)
        difference = difference or Moment(start.tensors).difference(end)
        if changes:
            difference = f"`{changes[0]}`, which the programs change"
        elif other_random_state(entry.seen.generators) != elsewhere:
            difference = "the random numbers of Python or NumPy"
        if difference is None:
            entry.trusted = entry.replays
            return self._accept(graph, by_graph)
        end.put_back()
        self.engine = "eager"
        self._distrust(difference)
        return self._finish(outcome)

    def _unlike(
        self, start: Moment, graph: Any, by_graph: Any, outcome: Any, args: Any, kwargs: Any
    ) -> str | None:
        """Names a result in which graph and programs differ by more than rounding explains.

        Programs that give another result at the same noise are refused: they count or draw.

        To measure rounding, the programs run again by other kernels, with each parameter moved by
        the last digits of the arithmetic in use. A small sum of large terms is mostly rounding
        error: oneDNN's gradient of a bias may be off by a percent. And a ReLU has a kink: two
        roundings of one number may be on its two sides.
        """
        difference = self._difference(graph, by_graph, outcome, [])
        if difference is None:
            return None
        after, leaves = Moment(start.tensors), leaves_of(start)
        moved: list[Any] = []
        signs = torch.Generator().manual_seed(0)
        try:
            start.put_back()
            with pyro.validation_enabled(False):
                again = self._reference(leaves, args, kwargs)
            if not self._repeats(again, outcome):
                return f"{difference}, and a second run at the same noise gives other results too"
            while difference and leaves and len(moved) < _TRIES:
                start.put_back()
                for t in leaves:
                    moves = torch.randint(-1, 2, t.shape, generator=signs).to(t)
                    t.detach().mul_(1 + 2 * resolution([t]) ** 2 * moves)
                torch.clear_autocast_cache()  # it keeps parameters in bfloat16 from before the move
                with pyro.validation_enabled(False), _other_kernels():
                    moved.append(self._reference(leaves, args, kwargs))
                difference = self._difference(graph, by_graph, outcome, moved)
            return difference
        finally:
            after.put_back()
            torch.clear_autocast_cache()

    def _distrust(self, difference: str) -> None:
        """Drops all graphs: each of them may depend on the value that has changed."""
        entries = [entry for known in self._entries.values() for entry in known]
        wrong = sum(entry.replays - entry.trusted for entry in entries) - 1  # this call is right
        self._distrusted = (
            f"the graph and the {self._captures_of} differ in {difference}: something that is not "
            "looked up at every call has probably changed (see captured.SVI); number of calls that "
            f"may be wrong: {wrong}"
        )
        self._entries.clear()
        self._warned = False
        self._refuse(self._distrusted)

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        if self.strict:
            raise NotCaptured(reason)
        if not self._warned:
            self._warned = True
            name = type(self).__name__
            text = f"captured.{name} runs eager: {reason}"
            warnings.warn(text, UserWarning, stacklevel=_frames_here())


def is_due(done: int) -> bool:
    """Returns whether a call is compared with the programs, after `done` calls by the graph."""
    return done > 0 and (done & (done - 1) == 0 or done % _SOMETIMES == 0)


def _frames_here() -> int:
    """Returns how many frames of this package are on top of the stack, with that of this call."""
    count, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pvae.captured"):
        count, frame = count + 1, frame.f_back
    return count


def _other_kernels() -> contextlib.AbstractContextManager[None]:
    """Uses torch's own kernels, not oneDNN's, if the networks are in full precision.

    In bfloat16 torch's own convolutions take 30 times as long, and moving the parameters by a digit
    changes more than oneDNN loses.
    """
    return contextlib.nullcontext() if torch.is_autocast_enabled("cpu") else without_onednn()


def spot_value(spot: Spot) -> float:
    """Returns the number at a spot."""
    return spot.holder[spot.key]


def leaves_of(moment: Moment) -> list[Tensor]:
    """Returns the leaf tensors of `moment` that may get a gradient."""
    return [t for t in moment.tensors if t.requires_grad and t.is_leaf]


def _store() -> set[tuple[str, int]]:
    return {(name, id(t)) for name, t in parameters().items()}
