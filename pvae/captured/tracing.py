"""From a Python function to compiled code, by tracing it on tensors that have no data.

How a tensor gets in. Whatever tensor the function touches and did not make itself (an argument, a
parameter, a buffer, a tensor in a closure) is an input of the graph, so that a change of its values
is seen by the next call; a number read from it stays a tensor (`.item()` returns it as it is), and
to branch on it, or to make a shape of it, cannot be traced. What else a call depends on is looked
up before it (`seen`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from pvae.captured import private, provenance
from pvae.captured.compiling import Compiler, NotCaptured, Run
from pvae.captured.private import pytree
from pvae.captured.reasons import is_of_tracing

Leaves = dict[int, Tensor]  # by the id of the tensor that each stands for


class _Outside(TorchFunctionMode):
    """Inside, every tensor that is not fake comes from outside, and its stand-in takes its place.

    A tensor without one is handed to `make`, and noted in `found`.
    """

    def __init__(self, stand_ins: dict[int, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stand_ins, self.make = stand_ins, make
        self.found: list[Tensor] = []  # keeps them alive, and so their ids unique
        self.error: Exception | None = None  # that the programs may have caught
        self.in_backward = False  # where torch works with tensors of its own as well

    def _stand_in(self, t: Tensor) -> Tensor:
        # a fake tensor is made around a meta tensor
        if isinstance(t, private.FakeTensor) or t.is_meta:
            return t
        if private.functorch.is_batchedtensor(t):
            return private.batched(t, self._stand_in)
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
        given = pytree.tree_leaves((args, kwargs))
        if self.in_backward and not any(id(t) in self.stand_ins for t in given):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(
            Tensor, self._stand_in, (args, kwargs), is_leaf=lambda v: isinstance(v, torch.Size)
        )
        if func is Tensor.item:  # a number that the program reads stays in the graph
            return args[0].detach()
        if func is Tensor.all and private.asks_for_dice():
            return True
        if func is Tensor.backward:  # the programs run again inside, where they are checkpointed
            self.in_backward = True
            try:
                with self:
                    return private.backward(*args, **kwargs)
            finally:
                self.in_backward = False
        try:
            # oneDNN's LSTM cannot be called from a graph; a convolution without oneDNN would have
            # another layout than at run time
            with without_onednn() if func is torch.lstm else contextlib.nullcontext():
                result = provenance.noted((args, kwargs), func(*args, **kwargs))
        except Exception as error:
            if is_of_tracing(error):
                self.error = error
            raise
        if isinstance(result, Tensor):  # written in place: it is kept as what it is outside
            for t in given:
                if isinstance(t, Tensor) and self.stand_ins.get(id(t)) is result:
                    return t
        return result


@contextlib.contextmanager
def _without_looking() -> Iterator[None]:
    """Nothing inside looks at the values of tensors, which are not there while tracing."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(torch.compiler.set_stance("force_eager"))  # what is torch.compile's
        for owner, name, value in (
            (private.compiler, "_is_compiling_flag", True),
            (private.pyro_util, "torch_isnan", lambda value: False),
            (private.infer_util, "_fulldot", _without_zeros),
            (Distribution, "_validate_sample", lambda self, value: None),
            (Distribution, "__init__", _without_validation(Distribution.__init__)),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(pyro.validation_enabled(False))
        yield


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Kernels inside are torch's own."""
    before = private.c._get_mkldnn_enabled()
    private.c._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        private.c._set_mkldnn_enabled(before)


def _without_validation(init: Callable[..., None]) -> Callable[..., None]:
    """A law's `__init__` that does not look at its parameters."""

    def unvalidated(
        self: Any, batch_shape: Any = (), event_shape: Any = (), validate_args: Any = None
    ) -> None:
        init(self, torch.Size(batch_shape), torch.Size(event_shape), False)

    return unvalidated


def _without_zeros(prob: Tensor, cost: Tensor) -> Tensor:
    """The sum of `prob * cost` where `prob` is not 0, as `Dice` takes it."""
    return (prob * torch.where(prob > 0, cost, torch.zeros_like(cost))).sum()


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


def parameters() -> dict[str, Tensor]:
    """Pyro's store: the unconstrained tensors by name."""
    return dict(pyro.get_param_store().named_parameters())


def _leaf(stand_in: Tensor, t: Tensor) -> Tensor:
    """A leaf with the values of `stand_in`, for which a gradient is kept where one is for `t`."""
    leaf = stand_in.detach()
    return leaf.requires_grad_() if t.requires_grad else leaf


def _leaf_in(mode: Any) -> Callable[[Tensor], Tensor]:
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
        private.FakeTensorMode() as fake,
        _Outside({}, _leaf_in(fake)) as outside,
    ):
        result = function()
        if outside.error is not None:
            raise outside.error
        return result, outside.found


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
        traced = private.make_fx(of_inputs, tracing_mode="fake")(*values)

    results = _keep_draws(traced)
    # the graph says itself where it casts
    with torch.no_grad(), private.DisableAutocast():
        code = compiler(traced, values)

    def run(*now: Tensor) -> Sequence[Any]:
        with torch.no_grad(), private.DisableAutocast():
            return code(*now)[:results]

    return run


def _keep_draws(graph: GraphModule) -> int:
    """Makes results of the draws that nothing depends on, lest a compiler leave them out and the
    noise after them be another; how many results there were."""
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
