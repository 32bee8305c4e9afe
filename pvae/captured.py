r"""SVI whose step is traced once and compiled: plain Pyro programs, their handlers run once.

A step of stock SVI runs model and guide under Pyro's handlers, and torch's autograd after them, in
Python each time. Where the pair has a static structure the arithmetic is the same at every step:

    (parameters, data, random state)  ->  loss, gradients, new buffers

`captured.SVI` traces that function once, by running the programs on fake tensors (which have
shapes and no data) under `torch.fx`'s `make_fx`, has inductor compile it, and from then on calls
the compiled function and the optimizer. The draws are part of the graph: torch's own kernels in
the same order, so that a seed gives the noise that it gives stock SVI.

How a tensor gets in. Whatever tensor the programs touch and did not make themselves (an argument,
a parameter, a buffer, a tensor in a closure) is an input of the graph, so that a change of its
values is seen by the next step; a number read from it stays a tensor (`.item()` returns it as it
is), and to branch on it, or to make a shape of it, cannot be traced. Parameters come from Pyro's
store by their name. The numbers of handlers around the step (`pvae.temper`, `poutine.scale`) are
inputs too. All else that a step may depend on and that can be looked up cheaply makes a graph of
its own: shapes, numbers among the arguments, and the plain attributes (`training` is one) and the
tensors of every module that the pair calls.

What a graph cannot see is a Python variable outside of that, such as a global number: as in any
traced program it keeps the value that it had.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from pyro.poutine import runtime
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Run = Callable[..., Sequence[Any]]
Compiler = Callable[[GraphModule, list[Tensor]], Run]

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_KINDS = frozenset(_PLAIN)
_SIGNATURES = 100  # that are told apart; beyond it a step with a new one runs eager


class NotCaptured(RuntimeError):
    """The step cannot be captured; the message says why."""


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
        *given, (for_input, for_weight, _) = node.args
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


def _layout(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad


def _parameters() -> dict[str, Tensor]:
    """Pyro's store: the unconstrained tensors by name."""
    return dict(pyro.get_param_store().named_parameters())


class _Graph(NamedTuple):
    """One captured step and what it is called with: arguments, then parameters, then the rest."""

    run: Run
    names: list[str]  # of the parameters, in Pyro's store
    parameters: list[Tensor]  # as captured
    owned: set[str]  # names whose tensor a module holds as well
    rest: list[Tensor]
    layouts: list[Hashable]  # of parameters and rest
    losses: int  # how many of the results are losses (an ELBO may have several)
    is_tuple: bool
    with_gradient: list[int]  # which parameters the other results are the gradients of

    def trained(self) -> list[Tensor] | None:
        """The parameters as they are now; None where the graph does not fit them any more."""
        known = _parameters()
        now = [known.get(name) for name in self.names]
        for name, tensor, captured in zip(self.names, now, self.parameters, strict=True):
            if tensor is not captured and name in self.owned:
                return None
        found = [t for t in now if t is not None]
        return found if [_layout(t) for t in (*found, *self.rest)] == self.layouts else None

    def __call__(
        self, arguments: list[Tensor], parameters: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The losses, and the gradient of each parameter."""
        # the graph says itself where it casts
        with torch.no_grad(), torch._C._DisableAutocast():
            results = self.run(*arguments, *parameters, *self.rest)
        gradients: list[Tensor | None] = [None] * len(parameters)
        for i, gradient in zip(self.with_gradient, results[self.losses :], strict=True):
            gradients[i] = gradient
        return list(results[: self.losses]), gradients


# ---- what a step depends on ----


class _Signature(NamedTuple):
    """What tells one graph from another, and the tensors that change from step to step."""

    key: Hashable
    tensors: list[Tensor]  # of the arguments, then of the handlers around the step
    numbers: list[tuple[Any, str, Tensor]]  # handler, attribute, the number as a tensor


def _signature(args: Any, kwargs: Any, modules: Sequence[nn.Module]) -> _Signature:
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
            key.append((_layout(value), first.setdefault(id(value), len(first))))
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
                number = torch.tensor(value, dtype=torch.float64)
                numbers.append((handler, name, number))
                add(number, where)
            else:
                add(value, where)
    key += _state(modules)
    return _Signature(tuple(key), tensors, numbers)


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
def _as_tensors(numbers: Sequence[tuple[Any, str, Tensor]]) -> Iterator[None]:
    """The handlers' numbers are tensors inside."""
    before = [getattr(handler, name) for handler, name, _ in numbers]
    for handler, name, number in numbers:
        setattr(handler, name, number)
    try:
        yield
    finally:
        for (handler, name, _), value in zip(numbers, before, strict=True):
            setattr(handler, name, value)


def _submodules(program: Any) -> list[nn.Module]:
    """The modules that a program is, or is a method of."""
    module = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    return list(module.modules()) if isinstance(module, nn.Module) else []


@contextlib.contextmanager
def _called(modules: dict[nn.Module, None]) -> Iterator[None]:
    """Notes every module that is called inside."""
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: modules.setdefault(module)
    )
    try:
        yield
    finally:
        hook.remove()


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), on_cuda


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _other_random_state() -> Hashable:
    """Of Python's and NumPy's generators, whose draws a graph would freeze."""
    state = pyro.util.get_rng_state()
    return state["random"], state["numpy"][1].tobytes(), state["numpy"][2]


# ---- SVI ----


class SVI(pyro.infer.SVI):
    r"""A drop-in for `pyro.infer.SVI` whose step is captured once and then compiled code.

    The first step with a new signature (shapes, dtypes, device, train or eval mode, numbers among
    the arguments) is stock SVI's, with all of Pyro's validation; a later one captures, and holds
    loss and gradients of the graph against Pyro's at the same noise before the graph is used. A
    captured step does not validate; it warns of a NaN loss as Pyro does. `evaluate_loss` is stock.

    What cannot be captured runs as stock SVI, with one warning that says why. `engine` is
    "captured" or "eager": how the last step ran; `reason` says why not captured, where it is known.

    Args:
        model, guide, optim, loss, loss_and_grads, num_samples, num_steps: as `pyro.infer.SVI`.
        strict: raise instead of running eager.
        after: steps with one signature that run eager before it is captured, at least 1; to
            compile takes seconds, and a rare signature (the short last batch) does not pay it back.
        max_graphs: how often to capture; beyond it a new signature runs eager.
        compiler: `inductor`, which needs a C++ compiler on a CPU, or `as_traced`.

    Raises:
        ValueError: `after` or `max_graphs` is below 1.
        NotCaptured: by `step`, with `strict`.

    >>> import pvae
    >>> from pyro.infer import Trace_ELBO
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    >>> svi = SVI(vae.model, vae.guide, adam, Trace_ELBO(), compiler=as_traced)
    >>> for _ in range(3):
    ...     loss = svi.step(torch.ones(4, 1, 8, 8))
    ...     print(svi.engine)
    eager
    eager
    captured
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: pyro.optim.PyroOptim,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        strict: bool = False,
        after: int = 1,
        max_graphs: int = 8,
        compiler: Compiler = inductor,
    ) -> None:
        for name, value in (("after", after), ("max_graphs", max_graphs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        super().__init__(model, guide, optim, loss, loss_and_grads, num_samples, num_steps)
        self.strict, self.after, self.max_graphs = strict, after, max_graphs
        self.compiler = compiler
        self.engine = "eager"
        self.reason: str | None = None
        self.captures = 0  # how often a graph was made
        self._modules = dict.fromkeys([*_submodules(model), *_submodules(guide)])
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()
        self._warned = False

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, as `pyro.infer.SVI.step`; returns the estimate of the loss."""
        try:
            signature = _signature(args, kwargs, list(self._modules))
        except NotCaptured as error:
            self._refuse(str(error))
            return self._eager(args, kwargs)
        graph = self._graphs.get(signature.key)
        if graph is None:
            return self._uncaptured_step(signature, args, kwargs)
        parameters = graph.trained()
        if parameters is None:  # as after `clear_param_store`: the programs have to run
            del self._graphs[signature.key]
            return self._eager(args, kwargs)
        return self._captured_step(graph, signature.tensors, parameters)

    # ---- the two engines ----

    def _captured_step(
        self, graph: _Graph, arguments: list[Tensor], parameters: list[Tensor]
    ) -> Any:
        self.engine, self.reason = "captured", None
        losses, gradients = graph(arguments, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optim(parameters)
        for parameter in parameters:
            parameter.grad = None
        values = [warn_if_nan(torch_item(loss), "loss") for loss in losses]
        return tuple(values) if graph.is_tuple else values[0]

    def _eager(self, args: Any, kwargs: Any) -> Any:
        self.engine = "eager"
        return super().step(*args, **kwargs)

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        if self.strict:
            raise NotCaptured(reason)
        if not self._warned:
            self._warned = True
            warnings.warn(f"captured.SVI runs eager: {reason}", UserWarning, stacklevel=4)

    def _uncaptured_step(self, signature: _Signature, args: Any, kwargs: Any) -> Any:
        if signature.key in self._refused:
            return self._eager(args, kwargs)
        if self.captures >= self.max_graphs or len(self._seen) >= _SIGNATURES:
            self._refuse(
                f"{self.captures} graphs for {len(self._seen)} signatures (shapes, numbers among "
                "the arguments, plain attributes of modules) were made; what changes from step to "
                "step should be a tensor"
            )
            return self._eager(args, kwargs)
        if self._seen[signature.key] < self.after:
            with _called(self._modules):
                loss = self._eager(args, kwargs)
            # with all modules known, and as they are after a step
            self._seen[_signature(args, kwargs, list(self._modules)).key] += 1
            return loss
        return self._capturing_step(signature, args, kwargs)

    # ---- capturing ----

    def _capturing_step(self, signature: _Signature, args: Any, kwargs: Any) -> Any:
        """A step of stock SVI, against which a new graph of it is held."""
        self.engine = "eager"
        self.captures += 1
        start = _random_state()
        made: _Graph | str
        try:
            with _as_tensors(signature.numbers):
                made = self._graph(signature.tensors, args, kwargs)
            by_graph = _tried(made, signature.tensors)
        except NotCaptured as error:
            made = str(error)
        except Exception as error:  # whatever the tracer or the compiler says of these programs
            made = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _set_random_state(start)

        elsewhere = _other_random_state()
        loss, sites = self._loss_and_sites(args, kwargs)
        parameters = {site["value"].unconstrained() for site in sites.values()}
        losses = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        if isinstance(made, _Graph):
            if _other_random_state() != elsewhere:
                made = "the programs draw random numbers of Python or NumPy"
            elif not _agree(made, by_graph, losses, parameters):
                made = "the graph's loss and gradients are not those of the programs"
        if isinstance(made, _Graph):
            self._graphs[signature.key] = made
        else:
            self._refused.add(signature.key)
            self._refuse(made)
        self.optim(parameters)
        zero_grads(parameters)
        return losses

    def _loss_and_sites(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with poutine.trace(param_only=True) as sites:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss, sites.trace.nodes

    def _graph(self, arguments: list[Tensor], args: Any, kwargs: Any) -> _Graph:
        """Traces and compiles loss and gradients at these arguments."""
        with _without_looking(), _keeping_store():
            # once to see which tensors the programs touch ...
            with FakeTensorMode() as fake, _Outside({}, _leaf_in(fake)) as outside:
                loss, sites = self._loss_and_sites(args, kwargs)
            by_name: dict[str, Tensor] = {}
            for name, site in sites.items():
                parameter = site["value"].unconstrained()
                # a module that model and guide share is in the store under two names
                if not any(parameter is other for other in by_name.values()):
                    by_name[name] = parameter
            names, parameters = list(by_name), list(by_name.values())
            known = {id(t) for t in (*arguments, *parameters)}
            rest = [t for t in outside.found if id(t) not in known]
            inputs = [*arguments, *parameters, *rest]
            if any(t.grad_fn is not None for t in inputs):
                raise NotCaptured("the programs use a tensor with a history of gradients")

            # ... and once as a function of them
            with_gradient: list[int] = []

            def loss_and_gradients(*fakes: Tensor) -> list[Tensor]:
                leaves = [_leaf(f, t) for f, t in zip(fakes, inputs, strict=True)]
                stand_ins = {id(t): leaf for t, leaf in zip(inputs, leaves, strict=True)}
                with _Outside(stand_ins, _unknown):
                    loss, _ = self._loss_and_sites(args, kwargs)
                losses = [torch.as_tensor(v) for v in (loss if isinstance(loss, tuple) else [loss])]
                gradients = [stand_ins[id(p)].grad for p in parameters]
                with_gradient[:] = [i for i, g in enumerate(gradients) if g is not None]
                return [*losses, *(g for g in gradients if g is not None)]

            values = [t.detach() for t in inputs]
            traced = make_fx(loss_and_gradients, tracing_mode="fake")(*values)
        with torch.no_grad(), torch._C._DisableAutocast():
            run = self.compiler(traced, values)
        held = {id(p) for module in self._modules for p in module._parameters.values()}
        return _Graph(
            run=run,
            names=names,
            parameters=parameters,
            owned={name for name, p in by_name.items() if id(p) in held},
            rest=rest,
            layouts=[_layout(t) for t in (*parameters, *rest)],
            losses=len(loss) if isinstance(loss, tuple) else 1,
            is_tuple=isinstance(loss, tuple),
            with_gradient=with_gradient,
        )


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
    before = _parameters()
    try:
        with _held(list(before.values())):
            yield
    finally:
        new = [name for name in _parameters() if name not in before]
        for name in new:
            del pyro.get_param_store()[name]
    if new:
        raise NotCaptured(f"the programs make a new parameter at this step: {new[0]!r}")


def _tried(graph: _Graph, arguments: list[Tensor]) -> Any:
    """What the graph returns; what it writes in place is written back."""
    tensors = [*arguments, *graph.parameters, *graph.rest]
    before = [t.detach().clone() for t in tensors]
    try:
        return graph(arguments, graph.parameters)
    finally:
        with torch.no_grad():
            for t, value in zip(tensors, before, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)


def _agree(graph: _Graph, by_graph: Any, loss: Any, parameters: Any) -> bool:
    """Whether loss and gradients of the graph are those left by Pyro, up to half of the digits."""
    losses, gradients = by_graph
    if set(graph.parameters) != parameters:
        return False
    tolerance = _epsilon(graph.parameters) ** 0.5
    error = norm = 0.0
    for parameter, gradient in zip(graph.parameters, gradients, strict=True):
        if parameter.grad is not None or gradient is not None:
            zero = torch.zeros_like(parameter)
            by_pyro = zero if parameter.grad is None else parameter.grad
            error += (by_pyro - (zero if gradient is None else gradient)).norm().item() ** 2
            norm += by_pyro.norm().item() ** 2
    values = loss if graph.is_tuple else (loss,)
    return error <= tolerance**2 * norm and all(
        abs(a.item() - b) <= tolerance * max(abs(b), 1.0)
        for a, b in zip(losses, values, strict=True)
    )


def _epsilon(tensors: Sequence[Tensor]) -> float:
    """The relative rounding error of the arithmetic that is asked for."""
    dtypes = [t.dtype for t in tensors if t.is_floating_point()]
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return max([2.0**-10] * tf32 + [torch.finfo(dtype).eps for dtype in dtypes])
