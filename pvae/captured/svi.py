r"""SVI whose step is traced once and compiled: plain Pyro programs, their handlers run once.

A step of stock SVI runs model and guide under Pyro's handlers, and torch's autograd after them, in
Python each time. Where the pair has a static structure the arithmetic is the same at every step:

    (parameters, data, random state)  ->  loss, gradients, new buffers

`captured.SVI` traces that function once, by running the programs on fake tensors (which have
shapes and no data) under `torch.fx`'s `make_fx`, has inductor compile it, and from then on calls
the compiled function and the optimizer. The draws are part of the graph: torch's own kernels in
the same order, so that a seed gives the noise that it gives stock SVI.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from pyro.util import warn_if_nan
from torch import Tensor
from torch.utils import _pytree as pytree

from pvae.captured.capturing import (
    Capturing,
    Signature,
    first_line,
    resolution,
    submodules,
    tried,
)
from pvae.captured.recording import Recorder, Recording
from pvae.captured.tracing import (
    Compiler,
    Leaves,
    NotCaptured,
    Run,
    compiled,
    inductor,
    layout,
    parameters,
    touched,
)
from pvae.optim import SingleOptimizer

_BEFORE_RECORDING = 3  # captured steps


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
        known = parameters()
        now = [known.get(name) for name in self.names]
        for name, tensor, captured in zip(self.names, now, self.parameters, strict=True):
            if tensor is not captured and name in self.owned:
                return None
        found = [t for t in now if t is not None]
        return found if [layout(t) for t in (*found, *self.rest)] == self.layouts else None

    def __call__(
        self, arguments: list[Tensor], parameters: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The losses, and the gradient of each parameter."""
        results = self.run(*arguments, *parameters, *self.rest)
        gradients: list[Tensor | None] = [None] * len(parameters)
        for i, gradient in zip(self.with_gradient, results[self.losses :], strict=True):
            gradients[i] = gradient
        return list(results[: self.losses]), gradients


class SVI(Capturing, pyro.infer.SVI):
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
        record: `cuda_graph` replays the whole step, optimizer and all, as one CUDA graph; it takes
            a pair and arguments on a GPU, and a `SingleOptimizer` of a fused torch optimizer.

    Raises:
        ValueError: `after` or `max_graphs` is below 1, or the optimizer cannot be recorded.
        NotCaptured: by `step`, with `strict`.

    >>> import pvae
    >>> from pvae import captured
    >>> from pyro.infer import Trace_ELBO
    >>> vae = pvae.build((1, 8, 8), latent_dim=2, net="mlp")
    >>> adam = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
    >>> svi = SVI(vae.model, vae.guide, adam, Trace_ELBO(), compiler=captured.as_traced)
    >>> for _ in range(3):
    ...     loss = svi.step(torch.ones(4, 1, 8, 8))
    ...     print(svi.engine)
    eager
    eager
    captured
    """

    _captures_of = "programs"

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
        record: Recorder | None = None,
    ) -> None:
        if record is not None:
            _check_recordable(optim)
        pyro.infer.SVI.__init__(
            self, model, guide, optim, loss, loss_and_grads, num_samples, num_steps
        )
        Capturing.__init__(
            self,
            [*submodules(model), *submodules(guide)],
            strict=strict,
            after=after,
            max_graphs=max_graphs,
            compiler=compiler,
        )
        self.record = record
        self.recordings = 0  # how often one was made
        self._recordings: dict[Hashable, Recording] = {}
        self._ran: Counter[Hashable] = Counter()  # captured steps, by signature

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, as `pyro.infer.SVI.step`; returns the estimate of the loss."""
        return pytree.tree_map_only(Tensor, _read, self.launch(*args, **kwargs))

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """One step that is not waited for: a captured one's loss is a tensor where the step runs,
        to be summed there and read once in a while; an eager one's is a number, as `step`'s."""
        return self._call(args, kwargs)

    def _eager(self, args: Any, kwargs: Any) -> Any:
        return pyro.infer.SVI.step(self, *args, **kwargs)

    def _captured(self, graph: _Graph, signature: Signature, args: Any, kwargs: Any) -> Any:
        trained = graph.trained()
        if trained is None:  # as after `clear_param_store`: the programs have to run
            del self._graphs[signature.key]
            self._recordings.pop(signature.key, None)
            del self._ran[signature.key]
            return self._eager(args, kwargs)
        self.engine, self.reason = "captured", None
        losses = self._run(graph, signature, trained)
        return tuple(losses) if graph.is_tuple else losses[0]

    def _run(self, graph: _Graph, signature: Signature, trained: list[Tensor]) -> list[Tensor]:
        """Loss, gradients and the optimizer's step, as one recording where there is one."""

        def whole(arguments: list[Tensor]) -> list[Tensor]:
            losses, gradients = graph(arguments, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            self.optim(trained)
            for parameter in trained:
                parameter.grad = None
            return losses

        if self.record is None:
            return whole(signature.tensors)
        own, optimizer = [*trained, *graph.rest], self.optim.optimizer
        recording = self._recordings.get(signature.key)
        if recording is None or not recording.fits(own, optimizer):
            self._ran[signature.key] += 1
            if self._ran[signature.key] <= _BEFORE_RECORDING:  # libraries set themselves up
                return whole(signature.tensors)
            recording = self._recorded(whole, signature.tensors, own)
            if recording is None:
                return whole(signature.tensors)
            self._recordings[signature.key] = recording
        return recording(signature.tensors, optimizer)

    def _recorded(
        self,
        whole: Callable[[list[Tensor]], list[Tensor]],
        arguments: list[Tensor],
        own: list[Tensor],
    ) -> Recording | None:
        """The step as a recording; None, and no more of them, where that cannot be."""
        assert self.record is not None
        try:
            if self.recordings >= 4 * self.max_graphs:
                raise NotCaptured(
                    f"{self.recordings} recordings were made: a setting of the optimizer other "
                    "than the learning rate, or the place of a tensor, changes all the time"
                )
            self.recordings += 1
            return Recording(whole, arguments, own, self.optim.optimizer, self.record)
        except Exception as error:  # whatever the GPU says of these kernels
            for t in own:
                t.grad = None
            self.record = None
            self._refuse(str(error) if isinstance(error, NotCaptured) else first_line(error))
            return None

    # ---- capturing ----

    def _as_it_is(self, args: Any, kwargs: Any) -> Any:
        """Stock SVI's step up to the optimizer's part: the losses, and what was trained."""
        loss, sites = self._loss_and_sites(args, kwargs)
        trained = {site["value"].unconstrained() for site in sites.values()}
        losses = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        return losses, trained

    def _after(self, outcome: Any) -> Any:
        losses, trained = outcome
        self.optim(trained)
        zero_grads(trained)
        return losses

    def _try(self, graph: _Graph, arguments: list[Tensor]) -> Any:
        own = (*arguments, *graph.parameters, *graph.rest)
        return tried(lambda: graph(arguments, graph.parameters), own)

    def _agree(self, graph: _Graph, by_graph: Any, outcome: Any) -> bool:
        return _same(graph, by_graph, *outcome)

    def _loss_and_sites(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with poutine.trace(param_only=True) as sites:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss, sites.trace.nodes

    def _graph(self, arguments: list[Tensor], args: Any, kwargs: Any) -> _Graph:
        """Traces and compiles loss and gradients at these arguments."""
        # once to see which tensors the programs touch ...
        (loss, sites), found = touched(lambda: self._loss_and_sites(args, kwargs))
        by_name: dict[str, Tensor] = {}
        for name, site in sites.items():
            parameter = site["value"].unconstrained()
            # a module that model and guide share is in the store under two names
            if not any(parameter is other for other in by_name.values()):
                by_name[name] = parameter
        trained = list(by_name.values())
        known = {id(t) for t in (*arguments, *trained)}
        rest = [t for t in found if id(t) not in known]

        # ... and once as a function of them
        with_gradient: list[int] = []

        def loss_and_gradients(leaves: Leaves) -> list[Tensor]:
            loss, _ = self._loss_and_sites(args, kwargs)
            losses = [torch.as_tensor(v) for v in (loss if isinstance(loss, tuple) else [loss])]
            gradients = [leaves[id(p)].grad for p in trained]
            with_gradient[:] = [i for i, g in enumerate(gradients) if g is not None]
            return [*losses, *(g for g in gradients if g is not None)]

        run = compiled(loss_and_gradients, [*arguments, *trained, *rest], self.compiler)
        held = {id(p) for module in self._modules for p in module._parameters.values()}
        return _Graph(
            run=run,
            names=list(by_name),
            parameters=trained,
            owned={name for name, p in by_name.items() if id(p) in held},
            rest=rest,
            layouts=[layout(t) for t in (*trained, *rest)],
            losses=len(loss) if isinstance(loss, tuple) else 1,
            is_tuple=isinstance(loss, tuple),
            with_gradient=with_gradient,
        )


def _check_recordable(optim: Any) -> None:
    single = isinstance(optim, SingleOptimizer)
    groups = optim.optimizer.param_groups if single else [{}]
    if not all(group.get("fused") and "capturable" in group for group in groups):
        given = f" of a {type(optim.optimizer).__name__} that is not" if single else ""
        raise ValueError(
            "record needs a pvae.SingleOptimizer of a fused optimizer that can be recorded, such "
            f"as torch.optim.Adam(..., fused=True); optim is a {type(optim).__name__}{given}"
        )


def _read(loss: Tensor) -> Any:
    return warn_if_nan(torch_item(loss), "loss")


def _same(graph: _Graph, by_graph: Any, loss: Any, parameters: Any) -> bool:
    """Whether loss and gradients of the graph are those left by Pyro, up to half of the digits."""
    losses, gradients = by_graph
    if set(graph.parameters) != parameters:
        return False
    tolerance = resolution(graph.parameters)
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
