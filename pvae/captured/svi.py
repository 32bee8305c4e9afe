r"""SVI whose step is traced once and compiled, so that Pyro's handlers run only once.

A step of stock SVI runs model and guide under Pyro's handlers, and then torch's autograd, in Python
each time. If the pair has a static structure, the arithmetic is the same at every step:

    (parameters, data, random state)  ->  loss, gradients, new buffers

`captured.SVI` traces this function once: it runs the programs on fake tensors (which have shapes
but no data) under `torch.fx`'s `make_fx`. Inductor compiles the traced function. From then on a
step calls the compiled function and the optimizer. The draws are part of the graph: they use
torch's own kernels in the same order, so a seed gives the same noise as with stock SVI.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.svi import SVI as StockSVI
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor

from pvae.captured import private
from pvae.captured.capturing import (
    Capturing,
    Entry,
    Graph,
    Signature,
    called,
    leaves_of,
    submodules,
)
from pvae.captured.compiling import Compiler, NotCaptured, inductor
from pvae.captured.moment import keeping_random_state, resolution
from pvae.captured.reasons import in_words
from pvae.captured.recording import Recorder, Recording
from pvae.captured.seen import Seen, layout
from pvae.captured.tracing import Leaves, compiled, parameters, touched
from pvae.optim import SingleOptimizer

_BEFORE_RECORDING = 3  # captured steps with one graph
_ROUNDINGS = 4  # rounding may change a result so many times as much as moving the parameters does


class _Results(NamedTuple):
    """The results of a step by a graph, before the optimizer's part."""

    losses: list[Tensor]
    gradients: list[Tensor | None]


class _Outcome(NamedTuple):
    """The results of stock SVI's step, before the optimizer's part."""

    losses: Any
    trained: set[Tensor]  # the parameters
    gradients: dict[Tensor, Tensor | None]  # the new `grad` of those leaves where it changed


@dataclasses.dataclass(kw_only=True)
class _Graph(Graph):
    """One captured step. Its `tensors` are the parameters, then the rest."""

    names: list[str]  # of the parameters, in Pyro's store
    parameters: list[Tensor]  # those of the capture
    constraints: list[Any]
    owned: set[str]  # names of the parameters that a module holds too
    losses: int  # how many of the results are losses (an ELBO may have several)
    is_tuple: bool
    with_gradient: list[int]  # indices, in parameters and others, of those with a gradient
    stored: list[str | None]  # names of the rest in Pyro's store
    reads_gradients: bool  # so it is right only if there are none from before
    trained: list[Tensor] = dataclasses.field(default_factory=list)  # the parameters now
    recordings: dict[Hashable, Recording] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.trained, *self.rest]

    @property
    def others(self) -> list[Tensor]:
        """Those of the rest that get a gradient but are not trained."""
        return [t for t in self.rest if t.requires_grad]

    def bind_to(self, seen: Seen) -> None:
        self.trained = self.parameters
        super().bind_to(seen)

    def bind(self, seen: Seen) -> bool:
        known, constraints = parameters(), private.constraints()
        trained = []
        for name, captured, constraint in zip(
            self.names, self.parameters, self.constraints, strict=True
        ):
            tensor = known.get(name)
            if (
                tensor is None
                or (tensor is not captured and name in self.owned)
                or constraints.get(name) is not constraint
                or private.has_hooks(tensor)
            ):
                return False
            trained.append(tensor)
        self.trained = trained
        for i, stored in enumerate(self.stored):
            if stored is not None:
                self.rest[i] = known.get(stored, self.rest[i])
        if not super().bind(seen) or any(map(private.has_hooks, self.others)):
            return False
        return not self.reads_gradients or not any(
            t.grad is not None and t.grad.any() for t in (*trained, *self.others)
        )

    def __call__(self, inputs: list[Tensor], rest: list[Tensor] | None = None) -> _Results:
        """Returns the losses, and the gradients of the parameters and then of the others."""
        results = self.run(*inputs, *self.trained, *(self.rest if rest is None else rest))
        gradients: list[Tensor | None] = [None] * (len(self.trained) + len(self.others))
        for i, gradient in zip(self.with_gradient, results[self.losses :], strict=True):
            gradients[i] = gradient
        return _Results(list(results[: self.losses]), gradients)


class SVI(Capturing, StockSVI):
    r"""A drop-in for `pyro.infer.SVI` whose step is captured once and then runs as compiled code.

    The first step with a new signature (shapes, dtypes, device, train or eval mode, and other
    values that the programs read) is a step of stock SVI, with all of Pyro's validation. A later
    step makes a graph, and compares its loss, gradients and random numbers with Pyro's before the
    graph is used. A captured step does not validate its arguments; it warns of a NaN loss, as Pyro
    does. `evaluate_loss` is that of stock SVI.

    Every step looks up the values that the code of the programs names: globals, closures,
    attributes of objects, of modules and of the ELBO, and hooks. A tensor may be replaced and a
    float may change at every step; any other change makes a new graph. Programs that change what
    they read (a counter, a list), or draw from generators other than torch's, run eager.

    Some values cannot be looked up in bounded time: those under names that a program makes while
    it runs, in files, in the environment, in containers of more than 256 elements, and inside of
    libraries. So captured steps are compared with Pyro again, after 1, 2, 4, 8, ... of them and
    after every 1,000th. If they differ, the rest of the run is eager, and a warning says how
    many steps may be wrong. A captured step prints nothing and writes no file, even if the
    programs do.

    A step that cannot be captured runs as stock SVI, with one warning that says why. `engine` says
    how the last step ran, "captured" or "eager"; `reason` says why it was not captured, if that is
    known. A copy of the object, or one that `pickle` reads, captures again.

    Args:
        model, guide, optim, loss, loss_and_grads, num_samples, num_steps: as `pyro.infer.SVI`.
        strict: raise an error instead of running eager.
        after: how many steps with a signature run eager before its capture, at least 1. A capture
            takes seconds, which a rare signature (the short last batch) does not win back.
        max_graphs: how often to capture, at least 1; after that a new signature runs eager.
        compiler: `inductor`, which needs a C++ compiler on a CPU, or `as_traced`.
        record: `cuda_graph` replays the whole step with the optimizer's part as one CUDA graph. It
            needs pair and arguments on a GPU, and a `SingleOptimizer` of a fused torch optimizer.

    Raises:
        ValueError: `after` or `max_graphs` is below 1, or the optimizer cannot be recorded.
        NotCaptured: with `strict`, by a step that cannot be captured.

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

    _programs = ("model", "guide", "loss", "loss_and_grads")
    _captures_of = "programs"

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
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
        StockSVI.__init__(self, model, guide, optim, loss, loss_and_grads, num_samples, num_steps)
        Capturing.__init__(
            self,
            [*submodules(model), *submodules(guide)],
            strict=strict,
            after=after,
            max_graphs=max_graphs,
            compiler=compiler,
        )
        self.record = record
        self._own = frozenset(vars(self))  # attributes that are not the user's

    def _begin(self) -> None:
        super()._begin()
        self.recordings = 0  # how often a step was recorded
        self._zeros: dict[Tensor, tuple[Tensor, int]] = {}  # after a step, with versions

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step, as `pyro.infer.SVI.step`; returns the estimate of the loss."""
        loss = self.launch(*args, **kwargs)
        return type(loss)(map(_read, loss)) if isinstance(loss, tuple) else _read(loss)

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step, without waiting for a GPU to finish it.

        The loss of a captured step is a tensor on the device of the step: sum such losses there,
        and read the sum once in a while. The loss of an eager step is a number, as in `step`.
        """
        return self._call(args, kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures the step with such arguments, before any such step is taken.

        The programs run, so they make the parameters that do not exist yet. But no parameter moves,
        and torch's random state stays the same. Call it under the handlers (`pvae.temper`) and in
        the modes of the steps to come; then every step with such arguments is captured.

        If the step with such arguments is captured already, nothing happens.

        Raises:
            NotCaptured: with `strict`, if the step cannot be captured.
        """
        try:
            reason = self._prepare(self._signature(args, kwargs), args, kwargs)
        except NotCaptured as error:
            reason = str(error)
        if reason:
            self._refuse(reason)

    def _prepare(self, signature: Signature, args: Any, kwargs: Any) -> str | None:
        """Captures a call; returns why there is no graph."""
        entries = self._entries.get(signature.key, [])
        for entry in entries:
            if (entry.graph is not None or entry.refused) and entry.fits(signature):
                return entry.refused
        if self.captures >= self.max_graphs:
            return self._too_many(entries, signature)
        seen = self._look()
        start = self._moment([*signature.tensors, *seen.tensors])
        try:
            with keeping_random_state(seen.generators):
                with called(self._modules):
                    self._reference(leaves_of(start), args, kwargs)
                start.put_back()
                entry = self._entry(signature)
                self._captured(entry, self._look(), signature, args, kwargs)
        finally:
            start.put_back()
        self._entries.setdefault(signature.key, []).insert(0, entry)
        self._signatures += 1
        return entry.refused

    # ---- one step ----

    def _eager(self, args: Any, kwargs: Any) -> Any:
        return StockSVI.step(self, *args, **kwargs)

    def _replay(self, entry: Entry, inputs: list[Tensor]) -> Any:
        """Computes loss and gradients and steps the optimizer, as one recording if there is one."""
        graph = entry.graph
        if self.record is None:
            return self._accept(graph, graph(inputs))

        def whole(given: list[Tensor]) -> list[Tensor]:
            rest = list(graph.rest)
            for i, t in zip(moving, given[len(inputs) :], strict=True):
                rest[i] = t
            results = graph(given[: len(inputs)], rest)
            self._apply(graph, results.gradients)
            return results.losses

        # a recording reads fixed addresses: tensors that were replaced are copied there, as inputs
        moving = [i for i, place in enumerate(graph.places) if place in entry.seen.moved]
        given = [*inputs, *(graph.rest[i] for i in moving)]
        return _loss(graph, self._recording(entry, whole, given, moving)(given))

    def _recording(
        self,
        entry: Entry,
        whole: Callable[[list[Tensor]], list[Tensor]],
        given: list[Tensor],
        moving: list[int],
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """Returns the step as a recording; `whole`, if there is none."""
        graph, optimizer = entry.graph, self.optim.optimizer
        still = [t for i, t in enumerate(graph.rest) if i not in moving]
        own = [*graph.trained, *still]
        untouched = [p.grad is None or self._is_zero(p) for p in graph.trained]
        if not all(untouched) or graph.others:  # the step adds to older gradients
            return whole
        key = tuple(moving), tuple(p.grad is None for p in graph.trained)
        recording = graph.recordings.get(key)
        if recording is None or not recording.fits(own, optimizer):
            if entry.replays <= _BEFORE_RECORDING:  # libraries set themselves up first
                return whole
            recording = self._recorded(whole, graph, given, own)
            if recording is None:
                return whole
            graph.recordings[key] = recording
        made = recording
        return lambda given: made(given, optimizer)

    def _apply(self, graph: _Graph, gradients: list[Tensor | None]) -> None:
        """Does the rest of a captured step: the same as stock SVI does with these gradients.

        Stock SVI leaves gradients of zeros, to which it adds the next ones: a parameter that gets
        no gradient any more is still trained, with zeros. Here all steps share the same zeros.
        """
        for t, gradient in zip((*graph.trained, *graph.others), gradients, strict=True):
            if gradient is not None and self._is_zero(t):
                t.grad = None
            _add_gradient(t, gradient)
        self.optim(graph.trained)
        self._leave_zeros(graph.trained)

    def _leave_zeros(self, trained: Iterable[Tensor]) -> None:
        for p in trained:
            if p.grad is not None:
                p.grad = self._zero(p)

    def _is_zero(self, p: Tensor) -> bool:
        zero, version = self._zeros.get(p, (None, 0))
        return zero is not None and p.grad is zero and zero._version == version

    def _zero(self, p: Tensor) -> Tensor:
        zero, version = self._zeros.get(p, (None, 0))
        if zero is None or zero._version != version or layout(zero)[:4] != layout(p)[:4]:
            zero = torch.zeros_like(p)
            self._zeros[p] = zero, zero._version
        return zero

    def _recorded(
        self,
        whole: Callable[[list[Tensor]], list[Tensor]],
        graph: _Graph,
        arguments: list[Tensor],
        own: list[Tensor],
    ) -> Recording | None:
        """Records the step. If that fails, returns None, and no step is recorded any more."""
        assert self.record is not None
        before = {p: p.grad for p in graph.trained}
        try:
            if self.recordings >= 4 * self.max_graphs:
                raise NotCaptured(
                    f"{self.recordings} recordings were made: a setting of the optimizer other "
                    "than the learning rate, or the place of a tensor, changes all the time"
                )
            self.recordings += 1
            for p in graph.trained:
                self._zero(p)  # now, so that the recording does not make the zeros
            return Recording(whole, arguments, own, self.optim.optimizer, self.record)
        except Exception as error:  # the GPU may refuse these kernels with any error
            for t, gradient in before.items():
                t.grad = gradient
            self.record = None
            self._refuse(in_words(error))
            return None

    # ---- capturing ----

    def _reference(self, leaves: list[Tensor], args: Any, kwargs: Any) -> _Outcome:
        """Runs stock SVI's step up to the optimizer's part. Puts the gradients back afterwards."""
        before = {t: t.grad for t in leaves}
        copies = {id(g): g.clone() for g in before.values() if g is not None}
        versions = {id(g): g._version for g in copies.values()}
        for t, gradient in before.items():
            t.grad = None if gradient is None else copies[id(gradient)]
        try:
            loss, sites = self._loss_and_sites(args, kwargs)
            trained = {site["value"].unconstrained() for site in sites.values()}
            gradients = {
                t: t.grad
                for t in {*leaves, *trained}
                if t.grad is not copies.get(id(before.get(t)))
                or (t.grad is not None and t.grad._version != versions[id(t.grad)])
            }
            for t in trained:
                t.grad = None
        finally:
            for t, gradient in before.items():
                t.grad = gradient
        losses = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        return _Outcome(losses, trained, gradients)

    def _repeats(self, again: _Outcome, outcome: _Outcome) -> bool:
        tolerance = resolution(list(outcome.trained))
        losses = [torch.tensor(o.losses, dtype=torch.float64) for o in (again, outcome)]
        return torch.allclose(losses[0], losses[1], rtol=tolerance, atol=tolerance, equal_nan=True)

    def _finish(self, outcome: _Outcome) -> Any:
        for t, gradient in outcome.gradients.items():
            if t.grad is None or gradient is None:
                t.grad = gradient
            else:
                t.grad.copy_(gradient)
        self.optim(outcome.trained)
        self._leave_zeros(outcome.trained)
        return outcome.losses

    def _accept(self, graph: _Graph, by_graph: _Results) -> Any:
        self._apply(graph, by_graph.gradients)
        return _loss(graph, by_graph.losses)

    def _difference(
        self, graph: _Graph, by_graph: _Results, outcome: _Outcome, moved: list[_Outcome]
    ) -> str | None:
        """Names the first result in which graph and Pyro differ; None if they agree.

        They may differ in half of their digits, and by `_ROUNDINGS` times the changes in `moved`.
        """
        if any(self._is_zero(t) and t.grad is not None and t.grad.any() for t in graph.trained):
            return "a gradient, to which other code wrote through its `.data`"
        outcomes = [outcome, *moved]
        tensors = [*graph.trained, *graph.others]
        tolerance = resolution(tensors)
        losses = [o.losses if graph.is_tuple else (o.losses,) for o in outcomes]
        for by_us, theirs, *others in zip(by_graph.losses, *losses, strict=True):
            loss = by_us.item()
            slack = tolerance * max(abs(theirs), 1.0) + _largest(abs(v - theirs) for v in others)
            if not (abs(loss - theirs) <= slack or _as_odd(loss, theirs)):
                return "the loss"
        if set(graph.trained) != outcome.trained:
            return "the set of parameters"
        gradients = [[o.gradients.get(t, t.grad) for o in outcomes] for t in tensors]
        total = sum(h.norm().item() ** 2 for h, *_ in gradients if h is not None) ** 0.5
        known = set(tensors)
        if any(g is not None and t not in known for t, g in outcome.gradients.items()):
            return "the set of tensors that get a gradient"
        names = [*graph.names, *("a tensor outside of Pyro's store" for _ in graph.others)]
        ours = _totals(tensors, by_graph.gradients)
        got = [g is not None for g in by_graph.gradients]
        for t, name, by_us, g, (h, *near) in zip(tensors, names, got, ours, gradients, strict=True):
            if by_us != (t in outcome.gradients):  # none is not the same as zeros
                return f"the gradient of `{name}`"
            if not by_us:
                continue
            if g is None or h is None:
                return f"the gradient of `{name}`"
            slack = tolerance * max(h.norm().item(), 0.1 * total)
            slack += _largest((other - h).norm().item() for other in near if other is not None)
            if not ((g - h).norm().item() <= slack or _as_odd(g, h)):
                return f"the gradient of `{name}`"
        return None

    def _loss_and_sites(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        with poutine.trace(param_only=True) as sites:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss, sites.trace.nodes

    def _make(self, inputs: list[Tensor], args: Any, kwargs: Any) -> _Graph:
        """Traces and compiles loss and gradients, for these arguments."""
        # the programs run once to see which tensors they touch ...
        (loss, sites), found, reads = touched(lambda: self._loss_and_sites(args, kwargs))
        by_name: dict[str, Tensor] = {}
        for name, site in sites.items():
            parameter = site["value"].unconstrained()
            # a module that model and guide share is in the store under two names
            if not any(parameter is other for other in by_name.values()):
                by_name[name] = parameter
        trained = list(by_name.values())
        names = {id(t): name for name, t in parameters().items()}
        missing = [name for name, t in by_name.items() if id(t) not in names]
        if missing:
            raise NotCaptured(
                f"the parameter {missing[0]!r} is not in Pyro's store: module_local_params is on"
            )
        # the zeros of parameters that are in the store no more are freed
        self._zeros = {t: zero for t, zero in self._zeros.items() if id(t) in names}
        known = {id(t) for t in (*inputs, *trained)}
        rest = [t for t in found if id(t) not in known]
        others = [t for t in rest if t.requires_grad]
        if any(map(private.has_hooks, (*trained, *others))):
            raise NotCaptured("a hook is registered on a parameter")

        # ... and once as a function of these tensors
        with_gradient: list[int] = []

        def loss_and_gradients(leaves: Leaves) -> list[Tensor]:
            loss, _ = self._loss_and_sites(args, kwargs)
            losses = [torch.as_tensor(v) for v in (loss if isinstance(loss, tuple) else [loss])]
            gradients = [leaves[id(t)].grad for t in (*trained, *others)]
            with_gradient[:] = [i for i, g in enumerate(gradients) if g is not None]
            return [*losses, *(g for g in gradients if g is not None)]

        run = compiled(loss_and_gradients, [*inputs, *trained, *rest], self.compiler)
        held = {id(p) for module in self._modules for p in module._parameters.values()}
        constraints = private.constraints()
        return _Graph(
            run=run,
            names=list(by_name),
            parameters=trained,
            constraints=[constraints.get(name) for name in by_name],
            owned={name for name, p in by_name.items() if id(p) in held},
            rest=rest,
            layouts=[layout(t) for t in (*trained, *rest)],
            losses=len(loss) if isinstance(loss, tuple) else 1,
            is_tuple=isinstance(loss, tuple),
            with_gradient=with_gradient,
            stored=[names.get(id(t)) for t in rest],
            reads_gradients=reads,
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


def _read(loss: Any) -> Any:
    return warn_if_nan(torch_item(loss), "loss") if isinstance(loss, Tensor) else loss


def _loss(graph: _Graph, losses: list[Tensor]) -> Any:
    return tuple(losses) if graph.is_tuple else losses[0]


def _add_gradient(t: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if t.grad is None:
        t.grad = gradient
    else:  # in place, as torch does: two tensors may share a gradient
        t.grad.add_(gradient)


def _totals(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns what the `grad` of each tensor is after its gradient is added."""
    totals = {id(t.grad): t.grad.clone() for t in tensors if t.grad is not None}
    for t, gradient in zip(tensors, gradients, strict=True):
        if t.grad is not None and gradient is not None:
            totals[id(t.grad)] += gradient  # which may be that of another tensor too
    return [
        gradient if t.grad is None else totals[id(t.grad)]
        for t, gradient in zip(tensors, gradients, strict=True)
    ]


def _largest(moves: Iterable[float]) -> float:
    """Returns how far rounding may move a result, from its changes when the parameters move."""
    return _ROUNDINGS * max([0.0, *moves])


def _as_odd(ours: Any, theirs: Any) -> bool:
    """Returns whether some values are not finite, and the two results still agree."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    odd = ~(ours.isfinite() & theirs.isfinite())
    return bool(odd.any()) and torch.allclose(ours, theirs, rtol=1e-2, equal_nan=True)
