"""What a captured call depends on, and when it is captured: one graph for each signature."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pvae.captured.tracing import Compiler, NotCaptured, layout

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_KINDS = frozenset(_PLAIN)
_SIGNATURES = 100  # that are told apart; beyond it a call with a new one runs eager


class Signature(NamedTuple):
    """What tells one graph from another, and the tensors that change from step to step."""

    key: Hashable
    tensors: list[Tensor]  # of the arguments, then of the handlers around the step
    numbers: list[tuple[Any, str, Tensor]]  # handler, attribute, the number as a tensor


def signature_of(args: Any, kwargs: Any, modules: Sequence[nn.Module]) -> Signature:
    leaves, structure = pytree.tree_flatten((args, kwargs))
    key: list[Hashable] = [structure, torch.get_default_dtype()]
    key.append(torch.get_float32_matmul_precision())
    for device in ("cpu", "cuda"):
        key += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)]
    tensors: list[Tensor] = []
    first: dict[int, int] = {}  # a tensor that is given twice is one input

    def add(value: Any, where: str) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise NotCaptured(f"{where} is a tensor that requires a gradient")
            tensors.append(value)
            key.append((layout(value), first.setdefault(id(value), len(first))))
        elif isinstance(value, _PLAIN):
            key.append((type(value), value))
        else:
            raise NotCaptured(
                f"{where} is of type {type(value).__name__}; only tensors, numbers and strings "
                "can be told apart, alone or in lists, tuples and dictionaries"
            )

    for leaf in leaves:
        add(leaf, "an argument")
    numbers = []
    for handler in runtime._PYRO_STACK:
        key.append(str(type(handler)))
        for name, value in vars(handler).items():
            where = f"{name} of the handler {type(handler).__name__} around the step"
            if type(value) is float:
                # filled there: a copy from the host would wait for the GPU
                beside = _accelerator(tensors, modules)
                number = torch.full((), value, dtype=torch.float64, device=beside)
                numbers.append((handler, name, number))
                add(number, where)
            else:
                add(value, where)
    key += _state(modules)
    return Signature(tuple(key), tensors, numbers)


def _accelerator(tensors: Sequence[Tensor], modules: Sequence[nn.Module]) -> torch.device:
    """Where the call runs: a CUDA graph would keep the value of a number on the host."""
    held = (p for module in modules for p in module._parameters.values() if p is not None)
    return next((t.device for t in (*tensors, *held) if t.is_cuda), torch.device("cpu"))


def _state(modules: Sequence[nn.Module]) -> list[Hashable]:
    """Plain attributes, and which tensors and submodules there are; looked up at every step."""
    state: list[Hashable] = []
    for module in modules:
        attributes = vars(module)
        for value in attributes.values():
            if (kind := type(value)) in _KINDS:
                state.append(value)
            elif kind is Tensor:
                state.append(id(value))
        for held in (attributes["_parameters"], attributes["_buffers"], attributes["_modules"]):
            if held:
                state += map(id, held.values())
    return state


@contextlib.contextmanager
def as_tensors(numbers: Sequence[tuple[Any, str, Tensor]]) -> Iterator[None]:
    """The handlers' numbers are tensors inside."""
    before = [getattr(handler, name) for handler, name, _ in numbers]
    for handler, name, number in numbers:
        setattr(handler, name, number)
    try:
        yield
    finally:
        for (handler, name, _), value in zip(numbers, before, strict=True):
            setattr(handler, name, value)


def submodules(program: Any) -> list[nn.Module]:
    """The modules that a program is, or is a method of."""
    module = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return list(module.modules()) if isinstance(module, nn.Module) else []


@contextlib.contextmanager
def called(modules: dict[nn.Module, None]) -> Iterator[None]:
    """Notes every module that is called inside."""
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: modules.setdefault(module)
    )
    try:
        yield
    finally:
        hook.remove()


def random_state() -> tuple[Tensor, list[Tensor]]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), on_cuda


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def other_random_state() -> Hashable:
    """Of Python's and NumPy's generators, whose draws a graph would freeze."""
    state = pyro.util.get_rng_state()
    return state["random"], state["numpy"][1].tobytes(), state["numpy"][2]


def resolution(tensors: Sequence[Tensor]) -> float:
    """Half of the digits of the arithmetic that is asked for: what two ways may differ by."""
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return max([2.0**-10] * tf32 + [torch.finfo(dtype).eps for dtype in dtypes]) ** 0.5


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def tried(call: Callable[[], Any], tensors: Sequence[Tensor]) -> Any:
    """What `call` returns; what it writes into the `tensors` in place is written back."""
    before = [t.detach().clone() for t in tensors]
    try:
        return call()
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)


class Capturing:
    """Calls that run eager, are captured once for each signature, and are a graph's from then on.

    A subclass says how: `_eager` and `_captured`, a call without and by a graph; and for the call
    that captures, `_graph` (makes one), `_try` (what it returns), `_as_it_is` (what is held against
    that), `_agree`, and `_after` (the rest of the call, and what it returns).
    """

    _captures_of: str  # what is captured, in messages

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
        self.captures = 0  # how often a graph was made
        self._modules = dict.fromkeys(modules)
        self._graphs: dict[Hashable, Any] = {}
        self._seen: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()
        self._warned = False

    def _eager(self, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _graph(self, arguments: list[Tensor], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _try(self, graph: Any, arguments: list[Tensor]) -> Any:
        raise NotImplementedError

    def _as_it_is(self, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _agree(self, graph: Any, by_graph: Any, outcome: Any) -> bool:
        raise NotImplementedError

    def _after(self, outcome: Any) -> Any:
        raise NotImplementedError

    def _captured(self, graph: Any, signature: Signature, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _call(self, args: Any, kwargs: Any) -> Any:
        self.engine = "eager"
        try:
            signature = signature_of(args, kwargs, list(self._modules))
        except NotCaptured as error:
            self._refuse(str(error))
            return self._eager(args, kwargs)
        key = signature.key
        graph = self._graphs.get(key)
        if graph is not None:
            return self._captured(graph, signature, args, kwargs)
        if key in self._refused:
            return self._eager(args, kwargs)
        if self.captures >= self.max_graphs or len(self._seen) >= _SIGNATURES:
            self._refuse(
                f"{self.captures} graphs for {len(self._seen)} signatures (shapes, numbers among "
                "the arguments, plain attributes of modules) were made; what changes from step to "
                "step should be a tensor"
            )
            return self._eager(args, kwargs)
        if self._seen[key] < self.after:
            with called(self._modules):
                result = self._eager(args, kwargs)
            # with all modules known, and as they are after a call
            self._seen[signature_of(args, kwargs, list(self._modules)).key] += 1
            return result
        self.captures += 1
        return self._capture(signature, args, kwargs)

    def _capture(self, signature: Signature, args: Any, kwargs: Any) -> Any:
        """The call as it is, against which a new graph of it is held at the same noise."""
        start, reason = random_state(), ""
        graph = by_graph = None
        try:
            with as_tensors(signature.numbers):
                graph = self._graph(signature.tensors, args, kwargs)
            by_graph = self._try(graph, signature.tensors)
        except NotCaptured as error:
            reason = str(error)
        except Exception as error:  # whatever the tracer or the compiler says
            reason = first_line(error)
        set_random_state(start)

        elsewhere = other_random_state()
        outcome = self._as_it_is(args, kwargs)
        if not reason and other_random_state() != elsewhere:
            reason = "random numbers of Python or NumPy are drawn"
        if not reason and not self._agree(graph, by_graph, outcome):
            reason = f"the graph's results are not those of the {self._captures_of}"
        if reason:
            self._refused.add(signature.key)
            self._refuse(reason)
        else:
            self._graphs[signature.key] = graph
        return self._after(outcome)

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        if self.strict:
            raise NotCaptured(reason)
        if not self._warned:
            self._warned = True
            name = type(self).__name__
            warnings.warn(f"captured.{name} runs eager: {reason}", UserWarning, stacklevel=5)
