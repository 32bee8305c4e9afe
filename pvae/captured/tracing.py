"""From a Python function to compiled code, by tracing it on tensors that have no data.

How a tensor gets in. Whatever tensor the function touches and did not make itself (an argument, a
parameter, a buffer, a tensor in a closure) is an input of the graph, so that a change of its values
is seen by the next call; a number read from it stays a tensor (`.item()` returns it as it is), and
to branch on it, or to make a shape of it, cannot be traced. The numbers of handlers around the call
(`pvae.temper`, `poutine.scale`) are inputs too. All else that a call may depend on and that can be
looked up cheaply makes a graph of its own: shapes, numbers among the arguments, and the plain
attributes (`training` is one) and the tensors of every module that is called.

What a graph cannot see is a Python variable outside of that, such as a global number: as in any
traced program it keeps the value that it had.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Run = Callable[..., Sequence[Any]]
Compiler = Callable[[GraphModule, list[Tensor]], Run]
Leaves = dict[int, Tensor]  # by the id of the tensor that each stands for


class NotCaptured(RuntimeError):
    """The call cannot be captured; the message says why."""


# ---- compilers ----


def inductor(graph: GraphModule, inputs: list[Tensor]) -> Run:
    """Compiles a traced step by torch's inductor, with torch's own random numbers."""
    _sum_for_biases(graph)
    options = {"fallback_random": True}  # inductor's own generators give other noise
    return torch._inductor.compile(graph, [*inputs], options=options)


def as_traced(graph: GraphModule, inputs: list[Tensor]) -> Run:
    """Leaves a traced step as it is: the same operators one by one, nothing to wait for."""
    return graph


def _sum_for_biases(graph: GraphModule) -> None:
    """The gradient of a convolution's bias is the sum of the output's gradient over all but its
    channels. oneDNN is up to a third slower where its backward is to return that as well."""
    aten = torch.ops.aten
    for node in [n for n in graph.graph.nodes if n.target is aten.convolution_backward.default]:
        *given, (for_input, for_weight, for_bias) = node.args
        if not for_bias:
            continue
        node.args = (*given, [for_input, for_weight, False])
        for user in [u for u in node.users if u.args[1] == 2]:  # getitem(node, 2)
            gradient = given[0]  # (B, C, ...)
            dims = [0, *range(2, gradient.meta["val"].dim())]
            with graph.graph.inserting_before(user):
                total = graph.graph.call_function(aten.sum.dim_IntList, (gradient, dims))
            total.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(total)
            graph.graph.erase_node(user)
    graph.recompile()


# ---- tracing ----


class _Outside(TorchFunctionMode):
    """Inside, every tensor that is not fake comes from outside, and its stand-in takes its place.

    A tensor without one is handed to `make`, and noted in `found`.
    """

    def __init__(self, stand_ins: dict[int, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stand_ins, self.make = stand_ins, make
        self.found: list[Tensor] = []  # keeps them alive, and so their ids unique

    def _stand_in(self, t: Tensor) -> Tensor:
        if isinstance(t, FakeTensor) or t.is_meta:  # a fake tensor is made around a meta tensor
            return t
        if id(t) not in self.stand_ins:
            self.stand_ins[id(t)] = self.make(t)
            self.found.append(t)
        return self.stand_ins[id(t)]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__hash__:  # Pyro's store looks parameters up
            return func(*args)
        args, kwargs = pytree.tree_map_only(Tensor, self._stand_in, (args, kwargs))
        # a number that the program reads stays in the graph
        return args[0].detach() if func is Tensor.item else func(*args, **kwargs)


@contextlib.contextmanager
def _without_looking() -> Iterator[None]:
    """Nothing inside looks at the values of tensors, which are not there while tracing."""
    compiling, isnan = torch.compiler._is_compiling_flag, pyro.util.torch_isnan
    torch.compiler._is_compiling_flag = True  # what torch.compiler.is_compiling says
    pyro.util.torch_isnan = lambda value: False  # type: ignore[assignment]  # what `warn_if_nan` asks
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.compiler._is_compiling_flag = compiling
        pyro.util.torch_isnan = isnan


@contextlib.contextmanager
def _held(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The gradients of `tensors` are gone inside, and as they were after."""
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


def layout(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad


def parameters() -> dict[str, Tensor]:
    """Pyro's store: the unconstrained tensors by name."""
    return dict(pyro.get_param_store().named_parameters())


def _leaf(stand_in: Tensor, t: Tensor) -> Tensor:
    """A leaf with the values of `stand_in`, for which a gradient is kept where one is for `t`."""
    return stand_in.detach().requires_grad_(t.requires_grad)


def _leaf_in(mode: FakeTensorMode) -> Callable[[Tensor], Tensor]:
    return lambda t: _leaf(mode.from_tensor(t), t)


def _unknown(t: Tensor) -> Tensor:
    raise NotCaptured(f"the programs make a tensor {tuple(t.shape)} in a way that cannot be traced")


@contextlib.contextmanager
def _keeping_store() -> Iterator[None]:
    """No parameter is made inside, and no gradient is left on one."""
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


def touched(function: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `function` returns on fake tensors, and the tensors that it touches and did not make."""
    with (
        _without_looking(),
        _keeping_store(),
        FakeTensorMode() as fake,
        _Outside({}, _leaf_in(fake)) as outside,
    ):
        return function(), outside.found


def compiled(
    function: Callable[[Leaves], list[Tensor]], inputs: list[Tensor], compiler: Compiler
) -> Run:
    """Traces and compiles `function`, which may touch the `inputs` only and finds by its argument
    the leaf that stands for each; the code is called with the inputs in their order."""
    if any(t.grad_fn is not None for t in inputs):
        raise NotCaptured("the programs use a tensor with a history of gradients")

    def of_inputs(*fakes: Tensor) -> list[Tensor]:
        leaves = {id(t): _leaf(fake, t) for fake, t in zip(fakes, inputs, strict=True)}
        with _Outside(leaves, _unknown):
            return function(leaves)

    values = [t.detach() for t in inputs]
    with _without_looking(), _keeping_store():
        traced = make_fx(of_inputs, tracing_mode="fake")(*values)

    # the graph says itself where it casts
    with torch.no_grad(), torch._C._DisableAutocast():
        code = compiler(traced, values)

    def run(*now: Tensor) -> Sequence[Any]:
        with torch.no_grad(), torch._C._DisableAutocast():
            return code(*now)

    return run
