"""Turns a Python function into compiled code, by tracing it on tensors that have no data.

Every tensor that the function touches but did not make itself (an argument, a parameter, a buffer,
a tensor in a closure) is an input of the graph, so the next call reads its new values. A number
that the function reads from a tensor stays a tensor (`.item()` returns a tensor). A branch on such
a number, or a shape made of it, cannot be traced. The other values on which a call depends are
looked up before the call (`seen`).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from pvae.captured import private, provenance
from pvae.captured.compiling import Compiler, NotCaptured, Run
from pvae.captured.known import Known
from pvae.captured.private import pytree
from pvae.captured.reasons import is_of_tracing

Leaves = dict[int, Tensor]  # each by the id of the tensor that it stands for


class _Outside(TorchFunctionMode):
    """Replaces tensors from outside by stand-ins, in every torch function inside the block.

    A tensor that is not fake comes from outside. If it has no stand-in yet, `make` makes one, and
    `found` notes the tensor.
    """

    def __init__(self, stand_ins: dict[int, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stand_ins, self.make = stand_ins, make
        self.found: list[Tensor] = []  # keeps tensors alive, and so their ids unique
        self.error: Exception | None = None  # of tracing; the programs may have caught it
        self.in_backward = False  # there torch also uses tensors of its own
        self.reads_gradients = False  # of tensors from outside
        self.known = Known()

    def _stand_in(self, t: Tensor) -> Tensor:
        # torch makes a fake tensor around a meta tensor
        if isinstance(t, private.FakeTensor) or t.is_meta:
            return t
        if private.functorch.is_batchedtensor(t) or private.functorch.is_gradtrackingtensor(t):
            return private.wrapped(t, self._stand_in)
        if t.layout is not torch.strided or t.is_quantized:
            kind = "quantized" if t.is_quantized else t.layout
            self._refuse(f"the programs use a tensor that is not dense ({kind})")
        if id(t) not in self.stand_ins:
            self.stand_ins[id(t)] = self.make(t)
            self.found.append(t)
        return self.stand_ins[id(t)]

    def _read_gradient(self, stand_in: Tensor) -> None:
        """Notes that a gradient is read; refuses one that an earlier call may have left."""
        self.reads_gradients = True
        if stand_in.grad is None:
            self._refuse("the programs read a gradient before they compute it")

    def _refuse(self, reason: str) -> None:
        self.error = NotCaptured(reason)
        raise self.error

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__hash__:  # Pyro's store finds parameters by their hash
            return func(*args)
        if func is Tensor.__deepcopy__:  # torch's own would share the fake tensor's memory
            t, memo = args
            copy = memo.get(id(t))
            if copy is None:
                copy = memo[id(t)] = _leaf(self._stand_in(t).clone(), t)
            return copy
        given = pytree.tree_leaves((args, kwargs))
        if self.in_backward and not any(id(t) in self.stand_ins for t in given):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(
            Tensor, self._stand_in, (args, kwargs), is_leaf=lambda v: isinstance(v, torch.Size)
        )
        if func == _GRADIENT and args[0] is not given[0]:
            self._read_gradient(args[0])
        if func in _AS_TEXT:
            self._refuse("the programs put the value of a tensor into a text")
        if func in _OF_MEMORY and args[0] is not given[0]:
            self._refuse("the programs ask where the memory of a tensor is")
        if func is Tensor.item:  # a number that the program reads stays in the graph
            number = self.known.number(args[0])
            return args[0].detach() if number is None else number
        if func is Tensor.unbind and args[1:] == (0,) and self.known.value(args[0]) is not None:
            with self:  # a loop over the indices of a plate: each of them is known too
                return tuple(args[0][i] for i in range(len(args[0])))
        if func is Tensor.all and private.asks_for_dice():
            return True
        if func is Tensor.backward:  # checkpointed programs run again inside
            self.in_backward = True
            try:
                with self:
                    return private.backward(*args, **kwargs)
            finally:
                self.in_backward = False
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self.known.index(args[1]), *args[2:])
        try:
            # oneDNN's LSTM cannot be called from a graph; a convolution without oneDNN would have
            # another layout than at run time
            with without_onednn() if func is torch.lstm else contextlib.nullcontext():
                result = provenance.noted((args, kwargs), func(*args, **kwargs))
            self.known.note(func, args, kwargs, result)
        except Exception as error:
            if is_of_tracing(error):
                self.error = error
            raise
        if isinstance(result, Tensor):  # written in place: return the tensor from outside
            for t in given:
                if isinstance(t, Tensor) and self.stand_ins.get(id(t)) is result:
                    return t
        return result


_GRADIENT: Any = Tensor.grad.__get__  # type: ignore[union-attr]
_AS_TEXT = (Tensor.__repr__, Tensor.__format__)
_OF_MEMORY = (Tensor.storage_offset, Tensor.data_ptr, Tensor.as_strided, torch.as_strided)


@contextlib.contextmanager
def _without_looking() -> Iterator[None]:
    """Turns off code of torch and Pyro that reads values of tensors: a traced tensor has none."""
    emptied: dict[int, Transform] = {}  # caches that hold nothing from before the block
    with contextlib.ExitStack() as patches:
        patches.enter_context(torch.compiler.set_stance("force_eager"))  # no torch.compile inside
        for owner, name, value in (
            (logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True),
            (private.compiler, "_is_compiling_flag", True),
            (private.pyro_util, "torch_isnan", lambda value: False),
            (private.infer_util, "_fulldot", _without_zeros),
            (Distribution, "_validate_sample", lambda self, value: None),
            (Distribution, "__init__", _without_validation(Distribution.__init__)),
            (Transform, "__call__", _emptied_first(Transform.__call__, emptied)),
            (Transform, "_inv_call", _emptied_first(Transform._inv_call, emptied)),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(pyro.validation_enabled(False))
        yield


@contextlib.contextmanager
def unhashable(numbers: Sequence[Tensor]) -> Iterator[None]:
    """Refuses these tensors, which stand for numbers, as keys inside the block.

    A dictionary finds a number by its value, but a tensor by its identity.
    """
    ids, hash_of = set(map(id, numbers)), Tensor.__hash__

    def hashed(t: Tensor) -> int:
        if id(t) in ids:
            raise NotCaptured("the programs look up a number in a dictionary or a set")
        return hash_of(t)

    with mock.patch.object(Tensor, "__hash__", hashed):
        yield


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Uses torch's own kernels inside the block, not oneDNN's."""
    before = private.c._get_mkldnn_enabled()
    private.c._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        private.c._set_mkldnn_enabled(before)


def _without_validation(init: Callable[..., None]) -> Callable[..., None]:
    """Returns the `__init__` of a distribution without the validation of its parameters."""

    def unvalidated(
        self: Any, batch_shape: Any = (), event_shape: Any = (), validate_args: Any = None
    ) -> None:
        init(self, torch.Size(batch_shape), torch.Size(event_shape), False)

    return unvalidated


def _emptied_first(
    call: Callable[..., Tensor], emptied: dict[int, Transform]
) -> Callable[..., Tensor]:
    """Returns a transform's `call` that empties its cache once: an earlier run has filled it."""

    def emptying(self: Any, value: Tensor) -> Tensor:
        if self._cache_size and id(self) not in emptied:
            self._cached_x_y = None, None
            emptied[id(self)] = self
        return call(self, value)

    return emptying


def _without_zeros(prob: Tensor, cost: Tensor) -> Tensor:
    """Returns the sum of `prob * cost` over the terms with `prob` above 0, as in `Dice`."""
    return (prob * torch.where(prob > 0, cost, torch.zeros_like(cost))).sum()


@contextlib.contextmanager
def _held(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Removes the gradients of `tensors` inside the block, and restores them after it.

    Raises:
        NotCaptured: one of the tensors got a gradient inside.
    """
    gradients = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    try:
        yield
        if any(t.grad is not None for t in tensors):
            raise NotCaptured("a parameter was used in a way that tracing does not see")
    finally:
        for t, gradient in zip(tensors, gradients, strict=True):
            t.grad = gradient


def parameters() -> dict[str, Tensor]:
    """Returns the unconstrained parameters in Pyro's store by name."""
    return dict(pyro.get_param_store().named_parameters())


def _leaf(stand_in: Tensor, t: Tensor) -> Tensor:
    """Returns a leaf with the values of `stand_in`; it requires a gradient if `t` does."""
    leaf = stand_in.detach()
    return leaf.requires_grad_() if t.requires_grad else leaf


def _leaf_in(mode: Any) -> Callable[[Tensor], Tensor]:
    def make(t: Tensor) -> Tensor:
        with private.outside_transforms():  # inside, torch.func refuses `requires_grad_`
            return _leaf(mode.from_tensor(t), t)

    return make


def _unknown(t: Tensor) -> Tensor:
    raise NotCaptured(f"the programs make a tensor {tuple(t.shape)} in a way that cannot be traced")


@contextlib.contextmanager
def _keeping_store() -> Iterator[None]:
    """Restores the parameters in Pyro's store, and their gradients, after the block.

    Raises:
        NotCaptured: a parameter was made, or one got a gradient.
    """
    before = parameters()
    try:
        with _held(list(before.values())):
            yield
    finally:
        new = [name for name in parameters() if name not in before]
        for name in new:
            del pyro.get_param_store()[name]
    if new:
        raise NotCaptured(f"the programs make a new parameter at this step: {new[0]!r}")


def touched(function: Callable[[], Any]) -> tuple[Any, list[Tensor], bool]:
    """Runs `function` on fake tensors.

    Returns its result, the outside tensors that it touches, and whether it reads a gradient.
    """
    with (
        _without_looking(),
        _keeping_store(),
        private.FakeTensorMode() as fake,
        _Outside({}, _leaf_in(fake)) as outside,
    ):
        result = function()
        if outside.error is not None:
            raise outside.error
        return result, outside.found, outside.reads_gradients


def compiled(
    function: Callable[[Leaves], list[Tensor]], inputs: list[Tensor], compiler: Compiler
) -> Run:
    """Traces and compiles `function`, which may touch no tensors but the `inputs`.

    The argument of `function` has, for the id of each input, the leaf that stands for it. The
    code takes tensors in the order of `inputs`.

    Raises:
        NotCaptured: an input has a history of gradients, or `function` touches another tensor.
    """
    if any(t.grad_fn is not None for t in inputs):
        raise NotCaptured("the programs use a tensor with a history of gradients")

    def of_inputs(*fakes: Tensor) -> list[Tensor]:
        leaves = {id(t): _leaf(fake, t) for fake, t in zip(fakes, inputs, strict=True)}
        with _Outside(leaves, _unknown):
            return function(leaves)

    values = [t.detach() for t in inputs]
    with _without_looking(), _keeping_store():
        traced = private.make_fx(of_inputs, tracing_mode="fake")(*values)

    results = _keep_draws(traced)
    # the graph itself has the casts of autocast
    with torch.no_grad(), private.DisableAutocast():
        code = compiler(traced, values)

    def run(*now: Tensor) -> Sequence[Any]:
        with torch.no_grad(), private.DisableAutocast():
            return code(*now)[:results]

    return run


def _keep_draws(graph: GraphModule) -> int:
    """Adds the draws that nothing uses to the results; returns the number of results before.

    Otherwise a compiler leaves such draws out, and the draws after them get other noise.
    """
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = list(output.args[0])
    draws = [
        node
        for node in graph.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not node.users
    ]
    output.args = ([*results, *draws],)
    graph.recompile()
    return len(results)
