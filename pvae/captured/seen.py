"""The values that programs can read besides their arguments: found once, compared at every call.

The code of a program names globals, closure cells and attributes. `Seen` follows each name once,
also into functions that are called, objects and their named attributes, modules and their tensors,
lists, tuples and dictionaries. It finds places that hold values; a shelf is a group of places that
one function reads.

A place may hold another tensor of the same layout at every call: the graph takes the tensor that is
there now. A float may change if its place is in `varying`. Every other value has to stay the same.

Not looked at: values under names that a program makes while it runs; files and the environment;
the elements of containers of more than 256 (only identity and length are compared); all but 1,024
numbers of a NumPy array; an `array.array` or similar object of more than 8 KiB; which names Pyro's
store has; the inside of libraries.
"""

import contextvars
import datetime
import decimal
import dis
import enum
import fractions
import functools
import importlib.util
import operator
import pathlib
import random
import sys
import sysconfig
import time
import types
import weakref
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer.reparam.reparam import Reparam
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import Tensor, nn

from pvae.captured import private
from pvae.captured.compiling import NotCaptured

_LONG = 256  # elements; of a longer container only identity and length are compared
_MANY = 1024  # numbers of a NumPy array that are compared
_MOST = 20_000  # objects that are visited
_PYTEST = ("pytest", "_pytest", "pluggy")  # pytest makes an `assert` in a test name these
_LIBRARIES = frozenset(
    {
        *("torch", "torchvision", "pyro", "numpy", "opt_einsum", "scipy", "sklearn", "pandas"),
        *("matplotlib", "tqdm", "PIL", "tensorboard", "wandb", "lightning", *_PYTEST),
    }
)
_STDLIB = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
# functions that read attributes by strings, and what reads all attributes of an object
_BY_STRING = frozenset({"getattr", "hasattr"})
_OF_ALL = frozenset({"vars", "__dict__"})
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), range),
    *(torch.dtype, torch.device, np.generic, decimal.Decimal, fractions.Fraction),
    pathlib.PurePath,
)
_OF_PYRO = (
    torch.distributions.Distribution,
    torch.distributions.Transform,
    Messenger,
    pyro.infer.ELBO,
    Reparam,
    torch.utils.data.Dataset,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
)
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_CONTAINERS = (list, tuple, dict, deque)
_COLLECTIONS = (*_CONTAINERS, set)
_CLOCKS = (time, datetime, datetime.datetime)
FLOATS = (float, np.floating)
_NOTHING = object()
_NO_ATTRIBUTES: dict[str, Any] = {}


class Spot(NamedTuple):
    """A place that holds a value: a key, an index, an attribute or a cell."""

    holder: Any  # a dictionary, list, cell, class or object; None: nothing can be put there
    key: Any
    name: str

    @property
    def is_open(self) -> bool:
        return self.holder is not None

    def put(self, value: Any) -> None:
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = value
        elif isinstance(self.holder, (dict, list, deque)):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)

    def is_at(self, other: "Spot") -> bool:
        return self.holder is other.holder and bool(self.key == other.key)


def layout(t: Tensor) -> tuple[Hashable, ...]:
    """Returns what two tensors must share for one to take the place of the other."""
    stride = t.stride() if t.layout is torch.strided else t.layout
    bits = t.is_neg(), t.is_conj()  # of a view whose values are still to be negated or conjugated
    return t.shape, stride, t.dtype, t.device, t.requires_grad, type(t), *bits


def _is_input(t: Any) -> bool:
    """Returns whether `t` is a tensor that another one may replace."""
    return type(t) is Tensor and not t.requires_grad


def is_value(value: Any) -> bool:
    """Returns whether `value` never changes and can be compared by `==`."""
    if isinstance(value, enum.Enum):
        return is_value(value._value_)
    return isinstance(value, (*_PLAIN, frozenset)) or (
        isinstance(value, tuple) and len(value) <= _LONG and all(map(is_value, value))
    )


def same(now: Any, then: Any) -> bool:
    """Returns whether a graph that was made with `then` is right for `now`."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, tuple) and is_value(now) and is_value(then):
        return len(now) == len(then) and all(map(same, now, then))
    if isinstance(now, (*FLOATS, range)) and now == then:
        return str(now) == str(then)  # 0.0 is not -0.0
    if is_value(now) and is_value(then):
        return bool(now == then) or bool(now != now and then != then)
    return _is_input(now) and _is_input(then) and layout(now) == layout(then)


def _fields(kind: type) -> tuple[str, ...]:
    """Returns the names of the fields of a class that `dataclasses` or attrs made."""
    by_attrs = (field.name for field in getattr(kind, "__attrs_attrs__", ()))
    return (*getattr(kind, "__dataclass_fields__", ()), *by_attrs)


def _is_record(value: Any) -> bool:
    """Returns whether `value` is compared by its fields, not by its identity.

    That is so for a frozen data class, and for a data class or an attrs object with a tensor in a
    field: a batch may be a new object at every call.
    """
    kind = type(value)
    if not (hasattr(kind, "__dataclass_fields__") or hasattr(kind, "__attrs_attrs__")):
        return False
    return getattr(getattr(kind, "__dataclass_params__", None), "frozen", False) or any(
        isinstance(getattr(value, name, None), Tensor) for name in _fields(kind)
    )


def _is_deep(value: Any) -> bool:
    """Returns whether the values inside `value` are compared too."""
    if isinstance(value, (*_COLLECTIONS, np.ndarray)):
        return not is_value(value)
    return _is_record(value)


def _opened(value: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns what is compared of a deep value itself, its keys, and the values inside it."""
    if isinstance(value, _COLLECTIONS) and len(value) > _LONG:
        return [value, len(value)], [], []
    own: list[Any] = [type(value)]
    if isinstance(value, dict):
        return [*own, len(value), *value], list(value), list(value.values())
    if isinstance(value, np.ndarray):
        own += (value.shape, value.dtype.str)
        some = value.reshape(-1)[:: max(1, -(-value.size // _MANY))]
        if value.dtype == object:
            return own, list(range(len(some))), list(some)
        return [*own, some.tobytes()], [], []
    if isinstance(value, set):
        return [*own, frozenset(value)], [], []
    if isinstance(value, _CONTAINERS):
        return [*own, len(value)], list(range(len(value))), list(value)
    names = list(_fields(type(value)))
    return own, names, [getattr(value, name, _NOTHING) for name in names]


def _flat(values: Sequence[Any], leaves: list[Any]) -> list[Any]:
    """Appends the values to `leaves`: for a deep value, its own part and the values inside it."""
    for value in values:
        if not _is_deep(value):
            leaves.append(value)
        else:
            own, _, inner = _opened(value)
            leaves += own
            _flat(inner, leaves)
    return leaves


def _places(spots: Sequence[Spot], values: Sequence[Any]) -> list[Spot]:
    """Returns the spot of every leaf of `_flat(values)`."""
    found: list[Spot] = []
    for spot, value in zip(spots, values, strict=True):
        own, keys, inner = _opened(value) if _is_deep(value) else ([value], [], [])
        found += [spot] * len(own)
        held = value if isinstance(value, (list, dict, deque)) else None
        found += _places([Spot(held, key, f"{spot.name}[{key!r}]") for key in keys], inner)
    return found


class _Shelf:
    """A group of values that are read together: the leaves then and now, with their spots.

    Args:
        closed: containers are compared by identity, and not by what they hold.
    """

    def __init__(
        self, spots: Sequence[Spot], read: Callable[[], Sequence[Any]], *, closed: bool = False
    ) -> None:
        self._read = read
        values = read()
        self.deep = not closed and any(map(_is_deep, values))
        self.then = _flat(values, []) if self.deep else list(values)
        self.spots = _places(spots, values) if self.deep else list(spots)

    def now(self) -> Sequence[Any]:
        values = self._read()
        return _flat(values, []) if self.deep else values

    def is_as_it_was(self, now: Sequence[Any]) -> bool:
        return len(now) == len(self.then) and all(map(operator.is_, now, self.then))


def _at(pairs: Sequence[tuple[Mapping[str, Any], str]]) -> Callable[[], Sequence[Any]]:
    """Returns a function that reads `holder[key]` for all pairs `(holder, key)`."""
    gets = [(holder.get, key) for holder, key in pairs]
    return lambda: [get(key, _NOTHING) for get, key in gets]


def _refill(holder: Any, content: Any) -> None:
    if not _holds_the_same(holder, content):
        holder.clear()
        (holder.update if isinstance(holder, dict) else holder.extend)(content)


def _put(holder: dict[Any, Any], content: dict[Any, Any]) -> None:
    for key, value in content.items():
        if holder.get(key, _NOTHING) is not value:
            holder[key] = value


@functools.lru_cache(maxsize=10_000)
def is_library(module: str | None) -> bool:
    """Returns whether a module belongs to a library, which is not looked into."""
    name = (module or "").partition(".")[0]
    if name not in sys.stdlib_module_names:
        return name in _LIBRARIES
    file = getattr(sys.modules.get(name), "__file__", None)  # a user's module may have such a name
    return file is None or (file.startswith(_STDLIB) and "site-packages" not in file)


class _Asked(NamedTuple):
    """What a piece of code names."""

    variables: frozenset[str]  # globals
    others: frozenset[str]  # attributes, and strings, which may be names of attributes
    modules: frozenset[tuple[str, Any]]  # imported while the code runs: name with dots, and items


@functools.lru_cache(maxsize=10_000)
def _asked(code: types.CodeType) -> _Asked:
    variables: set[str] = set()
    others: set[str] = set()
    modules: set[tuple[str, Any]] = set()
    for inner in _codes(code):
        constants: list[Any] = [0, None]  # an import names its level and its items before it
        for instruction in dis.get_instructions(inner):
            if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME"):
                variables.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                level, items = constants[-2:]
                modules.add(("." * level + instruction.argval, items))
            elif instruction.opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT")):
                constants.append(instruction.argval)
        others.update(inner.co_names)
        others.update(_strings(inner.co_consts))
    # `vars` and the like decide how attributes are looked at
    others -= variables - _BY_STRING - _OF_ALL
    return _Asked(frozenset(variables), frozenset(others), frozenset(modules))


def _strings(constants: Collection[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield from (constant, *constant.split("."))
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _attributes(value: Any) -> dict[str, Any]:
    try:
        found = getattr(value, "__dict__", None)
    except Exception:  # a class may refuse to be asked
        return _NO_ATTRIBUTES
    return found if isinstance(found, dict) else _NO_ATTRIBUTES


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TENSORS = ("_parameters", "_buffers", "_modules")
_OF_MODULES = frozenset(vars(nn.Module()))


class Seen:
    """The values that programs can read, as they are now.

    Args:
        holder: a dictionary of variables.
        names: the keys of the programs in `holder`.
        others: further objects, such as modules that the programs called, and classes of arguments.

    Raises:
        NotCaptured: the programs can read more than 20,000 objects.
    """

    def __init__(
        self, holder: dict[str, Any], names: Sequence[str], others: Sequence[Any] = ()
    ) -> None:
        self._names: set[str] = set()  # names in code, of attributes or others
        known = -1
        while known != len(self._names):  # a new name may be an attribute of an earlier object
            known = len(self._names)
            self._shelves: list[_Shelf] = []
            self._simple: list[tuple[Spot, Mapping[str, Any], str]] = []  # all on one shelf
            self.iterators: list[tuple[str, Any]] = []
            self.generators: list[Any] = []  # of random numbers
            self.clocks: list[str] = []  # names of what tells the time, or draws from the system
            self._typed: dict[int, tuple[str, Any]] = {}  # objects whose class is compared
            self._modules: dict[int, tuple[str, Any]] = {}  # whose dictionaries are compared
            self._sized: dict[int, tuple[str, Any]] = {}  # namespaces whose size is compared
            self._coded: dict[int, tuple[str, Any]] = {}  # functions whose code is compared
            self._long: list[tuple[str, Any, Any]] = []  # long containers with copies
            self._visited: dict[Any, Any] = {}  # keeps objects alive, and so their ids unique
            self._back: list[Callable[[], None]] = []  # each restores one object
            self._named(holder, "", names)
            for other in others:
                kind = other if isinstance(other, type) else type(other)
                self._visit(other, kind.__name__)
        pairs = [(holder, key) for _, holder, key in self._simple]
        self._shelf([spot for spot, _, _ in self._simple], _at(pairs))
        self._facts(self._typed, "__class__", "__dict__")
        self._facts(self._modules, *_TENSORS)
        self._facts(self._coded, "__code__", "__defaults__", "__kwdefaults__")
        sized = [value for _, value in self._sized.values()]
        self._shelf(
            [Spot(None, None, n) for n, _ in self._sized.values()], lambda: [*map(len, sized)]
        )
        hooks = [Spot(None, None, "a hook of all modules")] * len(private.global_hooks())
        self._shelves.append(_Shelf(hooks, private.global_hooks))
        self._visited.clear()
        self._simple.clear()
        self.varying: list[tuple[int, int]] = []  # (shelf, leaf) of floats that may change
        self.moved: set[int] = set()  # indices of tensors that were replaced
        self._note()

    # ---- looking up ----

    def holds(self) -> bool:
        """Returns whether the values are the same, except for tensors and floats that may change.

        If so, it takes the tensors and floats that are there now.
        """
        moved: dict[int, Sequence[Any]] = {}
        for i, shelf in enumerate(self._shelves):
            now = shelf.now()
            if shelf.is_as_it_was(now):
                continue
            if not self._may_hold(i, now):
                return False
            moved[i] = now
        if moved:
            pattern, tensors = self._pattern, self.tensors
            before = self._take(moved)
            if self._pattern != pattern:  # two places no longer share a tensor, or now do
                self._take(before)
                return False
            pairs = enumerate(zip(self.tensors, tensors, strict=True))
            self.moved.update(i for i, (now, then) in pairs if now is not then)
        return True

    def _may_hold(self, i: int, now: Sequence[Any]) -> bool:
        then = self._shelves[i].then
        return len(now) == len(then) and all(
            same(a, b) or ((i, leaf) in self.varying and may_vary(a, b))
            for leaf, (a, b) in enumerate(zip(now, then, strict=True))
        )

    def _take(self, values: dict[int, Sequence[Any]]) -> dict[int, Sequence[Any]]:
        """Puts the values on the shelves of these indices; returns the values from before."""
        before: dict[int, Sequence[Any]] = {i: self._shelves[i].then for i in values}
        for i, now in values.items():
            self._shelves[i].then = list(now)
        pairs = (pair for i, now in values.items() for pair in zip(now, before[i], strict=True))
        if any(a is not b and isinstance(a, Tensor) for a, b in pairs):
            self._note()
        return before

    def _note(self) -> None:
        leaves = (leaf for shelf in self._shelves for leaf in shelf.then)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._where: dict[int, int] = {}  # the first index of each tensor, by its id
        self._pattern = [self._where.setdefault(id(t), i) for i, t in enumerate(self.tensors)]

    def place_of(self, t: Tensor) -> int | None:
        """Returns the index of `t` in `tensors`; None if it is not there."""
        return self._where.get(id(t))

    def changes(self) -> list[str]:
        """Returns the names of the places with another value; another tensor is a change too."""
        found = []
        for shelf in self._shelves:
            now = shelf.now()
            if len(now) != len(shelf.then):
                found.append(shelf.spots[0].name if shelf.spots else "a hook of all modules")
                continue
            for value, then, spot in zip(now, shelf.then, shelf.spots, strict=True):
                if value is not then and (isinstance(value, Tensor) or not same(value, then)):
                    found.append(spot.name)
        return found + [name for name, now, then in self._long if not _holds_the_same(now, then)]

    def _others_than(self, other: "Seen") -> Iterator[tuple[int, int]]:
        """Yields `(shelf, leaf)` of each value that differs from that in `other`."""
        for i, (ours, theirs) in enumerate(zip(self._shelves, other._shelves, strict=False)):
            for leaf, (a, b) in enumerate(zip(ours.then, theirs.then, strict=False)):
                if not same(a, b):
                    yield i, leaf

    def vary_from(self, other: "Seen") -> list[tuple[int, int]] | None:
        """Returns `(shelf, leaf)` of the floats that differ from `other`; None if more differs."""
        sizes, others = ([len(shelf.then) for shelf in s._shelves] for s in (self, other))
        differ = list(self._others_than(other))
        are_numbers = all(
            isinstance(s._shelves[i].then[leaf], FLOATS) and self.spot((i, leaf)).is_open
            for i, leaf in differ
            for s in (self, other)
        )
        return differ if sizes == others and are_numbers else None

    def vary_as(self, other: "Seen") -> None:
        """Lets the floats change that may change in `other`."""
        spots = [spot for spot, _ in other.numbers()]
        self.varying = [
            (i, leaf)
            for i, shelf in enumerate(self._shelves)
            for leaf, spot in enumerate(shelf.spots)
            if any(map(spot.is_at, spots)) and isinstance(shelf.then[leaf], FLOATS)
        ]

    def first_change_from(self, other: "Seen") -> str | None:
        return next((self.spot(place).name for place in self._others_than(other)), None)

    def spot(self, place: tuple[int, int]) -> Spot:
        shelf, leaf = place
        return self._shelves[shelf].spots[leaf]

    def numbers(self) -> list[tuple[Spot, float]]:
        """Returns the spot and the value of each float that may change."""
        return [(self.spot((i, leaf)), self._shelves[i].then[leaf]) for i, leaf in self.varying]

    def put_back(self) -> None:
        """Restores the objects that were found to their state then; not the values in tensors."""
        for back in self._back:
            back()

    def forget(self) -> None:
        """Frees the copies that `put_back` and `changes` need."""
        self._back.clear()
        self._long.clear()

    # ---- finding ----

    def _shelf(self, spots: Sequence[Spot], read: Callable[[], Sequence[Any]]) -> None:
        if spots:
            self._shelves.append(_Shelf(spots, read))

    def _facts(self, of: dict[int, tuple[str, Any]], *attributes: str) -> None:
        """Puts attributes of all of the objects on one shelf; they are compared by identity."""
        objects, get = [value for _, value in of.values()], operator.attrgetter(*attributes)
        spots = [Spot(None, None, name) for name, _ in of.values() for _ in attributes]

        def read() -> Sequence[Any]:
            return [fact for value in objects for fact in get(value)]

        if spots:
            self._shelves.append(_Shelf(spots, read, closed=True))

    def _look_at(
        self, spots: Sequence[Spot], holder: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        """Puts each deep variable on a shelf of its own, and all others together on one."""
        for spot, key in zip(spots, keys, strict=True):
            if _is_deep(holder.get(key)):
                self._shelf([spot], _at([(holder, key)]))
            else:
                self._simple.append((spot, holder, key))

    def _visit(self, value: Any, name: str) -> None:
        is_plain = isinstance(value, (*_PLAIN, np.ndarray)) and is_library(type(value).__module__)
        if value is _NOTHING or is_plain or (isinstance(value, Tensor) and not vars(value)):
            return
        if id(value) in self._visited:
            return
        if isinstance(value, pyro.infer.SVI):  # only what the user gave it
            held = vars(value)
            names = self._names.intersection(held).difference(held.get("_own", held))
            return self._named(held, f"{name}.", names)
        if len(self._visited) >= _MOST:
            raise NotCaptured(f"the programs can read more than {_MOST:,} objects")
        self._visited[id(value)] = value
        if (
            any(value is clock for clock in _CLOCKS)
            or _is_of_time(value)
            or isinstance(value, random.SystemRandom)
        ):
            self.clocks.append(name)
        elif isinstance(value, _GENERATORS):
            self.generators.append(value)
        else:
            visit = next((visit for kinds, visit in _VISITS if isinstance(value, kinds)), None)
            if visit is not None:
                visit(self, value, name)
            elif hasattr(type(value), "__next__") or hasattr(type(value), "qsize"):
                self.iterators.append((name, value))
            else:
                self._object(value, name)

    def _method(self, method: types.MethodType, name: str) -> None:
        self._visit(method.__func__, name)
        if _is_record(method.__self__):
            self._shelf([Spot(None, None, name)], lambda: [method.__self__])
        self._visit(method.__self__, name)

    def _of_builtin(self, method: Any, name: str) -> None:
        """Looks at the object of a bound method, such as `batches.pop`."""
        held = method.__self__
        if not isinstance(held, (types.ModuleType, type, type(None))):
            self._shelf([Spot(None, None, f"the object of {name}")], lambda: [held])
            self._visit(held, f"the object of {name}")

    def _tensor(self, t: Tensor, name: str) -> None:
        names = self._names.intersection(vars(t))
        self._named(vars(t), f"{name}.", names - {"unconstrained"})  # which Pyro's store sets

    def _handled(self, program: ReparamHandler[Any, Any], name: str) -> None:
        self._visit(program.msngr, name)
        self._visit(program.fn, name)

    def _of_module(self, module: types.ModuleType, name: str) -> None:
        if not is_library(module.__name__):
            self._sized[id(module)] = module.__name__, vars(module)
            self._named(vars(module), f"{module.__name__}.", {*self._names, "__getattr__"})

    def _getter(self, getter: Any, name: str) -> None:
        """Adds the names that an `operator.attrgetter` or `methodcaller` holds."""
        names = [text for text in getter.__reduce__()[1] if isinstance(text, str)]
        self._names.update(part for text in names for part in text.split("."))

    def _proxy(self, proxy: types.MappingProxyType[Any, Any], name: str) -> None:
        self._shelf([Spot(None, None, name)], lambda: [dict(proxy)])
        for key, inner in proxy.items():
            self._visit(inner, f"{name}[{key!r}]")

    def _view(self, view: Any, name: str) -> None:
        self._shelf([Spot(None, None, name)], lambda: [list(view)])
        for inner in list(view):
            self._visit(inner, name)

    def _member(self, member: enum.Enum, name: str) -> None:
        self._shelf([Spot(None, None, f"{name}.value")], lambda: [member._value_])
        self._visit(member._value_, f"{name}.value")
        self._object(member, name)

    def _variable(self, variable: contextvars.ContextVar[Any], name: str) -> None:
        self._shelf([Spot(None, None, name)], lambda: [variable.get(_NOTHING)])
        self._visit(variable.get(None), name)

    def _container(self, value: Any, name: str) -> None:
        if isinstance(value, (list, dict, deque)):
            content = value.copy()
            self._back.append(functools.partial(_refill, value, content))
            if len(value) > _LONG:
                self._long.append((name, value, content))
        if len(value) > _LONG:
            return
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(pairs):
            self._visit(key, f"a key of {name}")
            self._visit(inner, f"{name}[{key!r}]")
            if isinstance(inner, str) and not _BY_STRING.isdisjoint(self._names):
                self._names.add(inner)
        if type(value) not in (*_COLLECTIONS, frozenset):  # a subclass
            self._object(value, name)

    def _partial(self, value: Any, name: str) -> None:
        self._visit(value.func, name)
        if value.args:
            self._shelf([Spot(None, None, f"an argument of {name}")], lambda: [value.args])
        for inner in (*value.args, value.keywords):
            self._visit(inner, name)
        self._sized[id(value.keywords)] = f"the arguments of {name}", value.keywords
        self._named(value.keywords, f"{name}, ", list(value.keywords))

    def _function(self, function: types.FunctionType, name: str) -> None:
        cells = [
            (Spot(cell, None, variable), cell)
            for variable, cell in zip(
                function.__code__.co_freevars, function.__closure__ or (), strict=True
            )
        ]
        if cells:
            inside = [cell for _, cell in cells]
            self._shelf([spot for spot, _ in cells], lambda: list(map(_content, inside)))
            for spot, cell in cells:
                content = _content(cell)
                self._back.append(functools.partial(_keep_cell, cell, content))
                self._visit(content, spot.name)
        if any(map(_is_deep, function.__defaults__ or ())):
            spots = [Spot(function, "__defaults__", f"the defaults of {name}")]
            self._shelf(spots, lambda: [function.__defaults__])
        self._visit(function.__defaults__, name)
        if function.__kwdefaults__:
            self._named(function.__kwdefaults__, f"{name}, ", list(function.__kwdefaults__))
        if hasattr(function, "__wrapped__"):
            self._visit(function.__wrapped__, name)
        if is_library(function.__globals__.get("__name__")):  # `wraps` copies `__module__`
            return
        asked = _asked(function.__code__)
        self._names |= asked.others
        self._coded[id(function)] = f"the code or the defaults of {name}", function
        self._sized[id(function)] = f"the attributes of {name}", vars(function)
        if vars(function):
            self._named(vars(function), f"{name}.", self._names)
        held = function.__globals__
        for module, items in asked.modules:
            self._imported(module, items, held.get("__package__") or "")
        # `globals()["scale"]` or `sys.modules[__name__].scale`
        if "globals" in asked.variables or "modules" in asked.others:
            self._named(held, "", asked.variables | asked.others)
        else:
            self._named(held, "", asked.variables)
        # a global may appear, also in place of a builtin
        missing = [key for key in asked.variables if key not in held]
        self._look_at([Spot(held, key, key) for key in missing], held, missing)

    def _imported(self, module: str, items: Sequence[str] | None, package: str) -> None:
        """Looks at a module that code imports, and at the modules among the imported items."""
        try:
            path = importlib.util.resolve_name(module, package)
        except ImportError:
            return
        paths = [path, *(f"{path}.{item}" for item in items or ())]
        known = [path for path in paths if path in sys.modules and not is_library(path)]
        self._look_at([Spot(None, None, path) for path in known], sys.modules, known)
        self._names.update(items or ())
        for path in known:
            self._visit(sys.modules[path], path)

    def _named(self, holder: dict[str, Any], prefix: str, names: Collection[str]) -> None:
        """Looks at the variables of `holder` that have one of the names."""
        keys = [key for key in list(holder) if key in names]
        content = {key: holder[key] for key in keys}
        self._back.append(functools.partial(_put, holder, content))
        spots = [Spot(holder, key, f"{prefix}{key}") for key in keys]
        self._look_at(spots, holder, keys)
        for key, value in content.items():
            self._visit(value, f"{prefix}{key}")

    def _class(self, kind: type, name: str = "", *, made: bool = True) -> None:
        """Looks at the attributes of a class that code names, and at methods that may be called.

        `__init__` and the like are looked at only if `made`: the programs make objects of it.
        """
        if (kind, made) in self._visited:
            return
        self._visited[kind, made] = kind
        if made and type(kind) is not type:
            self._class(type(kind), made=False)
        by_library = _has_library_base(kind)  # a library calls methods that no code here names
        for base in kind.__mro__:
            if is_library(base.__module__):
                continue
            self._sized[id(base)] = f"the attributes of {base.__name__}", vars(base)
            held = {
                key: value
                for key, value in vars(base).items()
                if (made or key not in _MAKING)
                and (
                    key in self._names
                    or (isinstance(value, _METHODS) and (by_library or _is_special(key)))
                )
            }
            spots = [Spot(base, key, f"{base.__name__}.{key}") for key in held]
            self._look_at(spots, vars(base), list(held))
            for key, value in held.items():
                if isinstance(value, property):
                    value = value.fget
                elif isinstance(value, functools.cached_property):
                    value = value.func
                elif isinstance(value, functools.singledispatchmethod):
                    value = value.dispatcher
                elif isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                elif isinstance(value, functools.partialmethod):
                    value = functools.partial(value.func, *value.args, **value.keywords)
                self._visit(value, f"{base.__name__}.{key}")

    def _module(self, module: nn.Module, name: str) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise NotCaptured("the programs run code of torch.jit, which cannot be traced")
        attributes = vars(module)
        self._modules[id(module)] = name, module
        held = [attributes[part] for part in (*_TENSORS, *_HOOKS)]

        def read() -> Sequence[Any]:
            found: list[Any] = [module.training]
            for part in held:
                if part:
                    found += part.values()
                    found += part
            return found

        spots = [Spot(attributes, "training", f"{name}.training")]
        for part in held:
            of_part = [Spot(part, key, f"{name}.{key}") for key in part]
            spots += 2 * of_part  # for values and keys
        self._shelf(spots, read)
        self._back.append(functools.partial(_refill, attributes, attributes.copy()))
        for part in held:
            self._back.append(functools.partial(_refill, part, part.copy()))
        self._class(type(module), made=False)
        self._plain(module, name, _OF_MODULES)
        if isinstance(module, PyroModule):
            self._named(attributes, f"{name}.", ("_pyro_samples", "_pyro_params"))
        for part in held:
            for key, value in list(part.items()):
                if isinstance(value, (nn.Module, Tensor)):
                    self._visit(value, f"{name}.{key}")
                elif callable(value):
                    self._visit(value, f"a hook of {name}")

    def _plain(self, value: Any, name: str, skipped: Collection[str]) -> None:
        """Looks at an object's own attributes that code names, or that a library reads."""
        attributes = _attributes(value)
        of_library = _has_library_base(type(value))
        if not of_library or isinstance(value, nn.Module):
            self._typed[id(value)] = f"the class of {name}", value
            self._sized[id(value)] = f"the attributes of {name}", attributes
        whole = of_library or not _OF_ALL.isdisjoint(self._names)
        keys = [
            key
            for key, inner in attributes.items()
            if key not in skipped
            and (key in self._names or key == "forward" or whole)
            and not (of_library and (key.startswith("_cached") or not _is_simple(inner)))
        ]
        # the object may get an attribute of its own in place of one of its class
        kinds = [kind for kind in type(value).__mro__ if not is_library(kind.__module__)]
        of_class = {key for kind in kinds for key in vars(kind)}
        own = (of_class & self._names) | ({"forward"} if isinstance(value, nn.Module) else set())
        keys += [key for key in own if key not in attributes]
        spots = [Spot(attributes, key, f"{name}.{key}") for key in keys]
        self._look_at(spots, attributes, keys)
        for key in keys:
            self._visit(attributes.get(key), f"{name}.{key}")

    def _object(self, value: Any, name: str) -> None:
        if _memory(value) is not None:
            self._shelf([Spot(None, None, name)], lambda: [_memory(value)])
        kind = type(value)
        self._class(kind, made=False)
        if _is_of(kind, "torch", "pyro", "numpy") and not isinstance(value, _OF_PYRO):
            return
        fields = _fields(kind) if _is_record(value) else ()  # compared where the record is held
        for key in fields:
            self._visit(getattr(value, key, None), f"{name}.{key}")
        attributes = _attributes(value)
        if "__wrapped__" in attributes:
            self._visit(attributes["__wrapped__"], name)
        if isinstance(value, weakref.ref):
            self._shelf([Spot(None, None, name)], lambda: [value()])
            self._visit(value(), f"{name}()")
        if hasattr(kind, "cache_info"):  # of `functools.lru_cache`
            size = Spot(None, None, f"the cache of {name}")
            self._shelf([size], lambda: [value.cache_info().currsize])
        if attributes is not _NO_ATTRIBUTES:
            self._back.append(functools.partial(_refill, attributes, attributes.copy()))
            self._plain(value, name, fields)
        slots = [
            s for base in kind.__mro__ for s in _slots(base) if s in self._names and s not in fields
        ]
        if slots:
            spots = [Spot(value, slot, f"{name}.{slot}") for slot in slots]
            self._shelf(spots, lambda: [getattr(value, s, _NOTHING) for s in slots])
            for slot in slots:
                self._visit(getattr(value, slot, None), f"{name}.{slot}")


# methods that are called when an object or a class is made
_MAKING = ("__new__", "__init__", "__post_init__", "__set_name__", "__init_subclass__")
_METHODS = (
    *(types.FunctionType, property, staticmethod, classmethod),
    *(functools.partialmethod, functools.cached_property, functools.singledispatchmethod),
)


def _is_special(name: str) -> bool:
    """Returns whether code can call a method without naming it, as `forward` or `__add__`."""
    return name == "forward" or (name.startswith("__") and name.endswith("__"))


def _has_library_base(kind: type) -> bool:
    """Returns whether a class has a library's base other than `nn.Module` and `PyroModule`."""
    bases = [base for base in kind.__mro__ if base not in (nn.Module, PyroModule)]
    return any(_is_of(base, "torch", "pyro", "collections") for base in bases)


def _is_of(kind: type, *libraries: str) -> bool:
    return kind.__module__.partition(".")[0] in libraries


def _is_of_time(value: Any) -> bool:
    return isinstance(value, types.BuiltinFunctionType) and value.__module__ == "time"


def _slots(kind: type) -> Sequence[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    own = f"_{kind.__name__.lstrip('_')}"  # Python puts it before a name such as `__scale`
    private = [s.startswith("__") and not s.endswith("__") for s in names]
    return [f"{own}{s}" if hidden else s for s, hidden in zip(names, private, strict=True)]


def _is_simple(value: Any) -> bool:
    """Returns whether a library's attribute can be compared, or was given by the user."""
    if isinstance(value, _CONTAINERS):
        inner = value.values() if isinstance(value, dict) else value
        return len(value) <= _LONG and all(map(_is_simple, inner))
    if isinstance(value, Tensor):
        return value.grad_fn is None  # else the object computed it, as weight_norm does
    given = (types.FunctionType, types.MethodType, functools.partial, nn.Module, weakref.ref)
    kinds = (torch.distributions.Distribution, torch.distributions.Transform, Reparam)
    return isinstance(value, (*_PLAIN, set, np.ndarray, *given, *kinds))


def _memory(value: Any) -> bytes | None:
    """Returns the content of an `array.array` or similar object of at most 8 KiB; else None."""
    try:
        memory = memoryview(value)
    except TypeError:
        return None
    return memory.tobytes() if memory.nbytes <= 8 * _MANY else None


def may_vary(now: Any, then: Any) -> bool:
    """Returns whether a graph with the input `then` is right for the number `now`.

    Python raises an error where a number is divided by 0; a tensor does not.
    """
    return isinstance(now, FLOATS) and bool((now == 0) == (then == 0))


def _holds_the_same(now: Any, then: Any) -> bool:
    """Returns whether two containers hold the same objects."""
    if isinstance(now, dict):
        return list(now) == list(then) and all(map(operator.is_, now.values(), then.values()))
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _NOTHING


def _keep_cell(cell: types.CellType, content: Any) -> None:
    if content is not _NOTHING and _content(cell) is not content:
        cell.cell_contents = content


# how a value is looked at, by its kind; the first kind that fits is taken
_VISITS: tuple[tuple[Any, Callable[[Seen, Any, str], None]], ...] = (
    ((*_COLLECTIONS, frozenset), Seen._container),
    (Tensor, Seen._tensor),
    (types.FunctionType, Seen._function),
    (types.MethodType, Seen._method),
    ((types.BuiltinMethodType, types.MethodWrapperType), Seen._of_builtin),
    (functools.partial, Seen._partial),
    (ReparamHandler, Seen._handled),
    (types.ModuleType, Seen._of_module),
    (type, Seen._class),
    (nn.Module, Seen._module),
    (PyroSample, lambda seen, value, name: seen._visit(value.prior, name)),
    (contextvars.ContextVar, Seen._variable),
    ((operator.attrgetter, operator.methodcaller), Seen._getter),
    (types.MappingProxyType, Seen._proxy),
    ((KeysView, ValuesView, ItemsView), Seen._view),
    (enum.Enum, Seen._member),
)
