r"""SVI whose step is traced once and compiled: plain Pyro programs, their handlers run once.

A step of stock SVI runs model and guide under Pyro's handlers, and torch's autograd after them, in
Python each time. Where the pair has a static structure the arithmetic is the same at every step:

    (parameters, data, random state)  ->  loss, gradients, new buffers

`captured.SVI` traces that function once, by running the programs on fake tensors (which have
shapes and no data) under `torch.fx`'s `make_fx`, has inductor compile it, and from then on calls
the compiled function and the optimizer. The draws are part of the graph: torch's own kernels in
the same order, so that a seed gives the noise that it gives stock SVI.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.svi import SVI as StockSVI
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor

from pvae.captured import private
from pvae.captured.capturing import Capturing, Entry, called, leaves_of, signature_of, submodules
from pvae.captured.compiling import Compiler, NotCaptured, Run, inductor
from pvae.captured.moment import keeping_random_state, resolution
from pvae.captured.reasons import in_words
from pvae.captured.recording import Recorder, Recording
from pvae.captured.seen import Seen, layout
from pvae.captured.tracing import Leaves, compiled, parameters, touched
from pvae.optim import SingleOptimizer

_BEFORE_RECORDING = 3  # captured steps
_ROUNDINGS = 4  # by so much more than the parameters' last digits those of all else may move


class _Results(NamedTuple):
    """A step by a graph, up to the optimizer's part."""

    losses: list[Tensor]
    gradients: list[Tensor | None]


class _Outcome(NamedTuple):
    """Stock SVI's step up to the optimizer's part."""

    losses: Any
    trained: set[Tensor]
    gradients: dict[Tensor, Tensor | None]  # of the trained, and of what else has one


@dataclasses.dataclass
class _Graph:
    """One captured step and what it is called with: inputs, then parameters, then the rest."""

    run: Run
    names: list[str]  # of the parameters, in Pyro's store
    parameters: list[Tensor]  # as captured
    constraints: list[Any]
    owned: set[str]  # names whose tensor a module holds as well
    rest: list[Tensor]
    layouts: list[Hashable]  # of parameters and rest
    losses: int  # how many of the results are losses (an ELBO may have several)
    is_tuple: bool
    others: list[Tensor]  # of the rest: those that are not trained, and get a gradient
    with_gradient: list[int]  # which parameters and others the other results are gradients of
    trained: list[Tensor] = dataclasses.field(default_factory=list)  # the parameters as they are
    places: list[int | None] = dataclasses.field(default_factory=list)  # of the rest

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.trained, *self.rest]

    def bind_to(self, seen: Seen) -> None:
        """From now on the rest is what `seen` has at the places where it is now."""
        self.trained = self.parameters
        self.places = [seen.place_of(t) for t in self.rest]

    def bind(self, seen: Seen) -> bool:
        """Takes the parameters and the rest as they are now; whether the graph fits them."""
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
        self.rest = [
            t if place is None else seen.tensors[place]
            for t, place in zip(self.rest, self.places, strict=True)
        ]
        return [layout(t) for t in self.tensors] == self.layouts and not any(
            map(private.has_hooks, self.others)
        )

    def __call__(self, inputs: list[Tensor], rest: list[Tensor]) -> _Results:
        """The losses, and the gradient of each parameter and each of the others."""
        results = self.run(*inputs, *self.trained, *rest)
        gradients: list[Tensor | None] = [None] * (len(self.trained) + len(self.others))
        for i, gradient in zip(self.with_gradient, results[self.losses :], strict=True):
            gradients[i] = gradient
        return _Results(list(results[: self.losses]), gradients)


class SVI(Capturing, StockSVI):
    r"""A drop-in for `pyro.infer.SVI` whose step is captured once and then compiled code.

    The first step with a new signature (shapes, dtypes, device, train or eval mode, and what else
    the programs see) is stock SVI's, with all of Pyro's validation; a later one captures, and holds
    loss, gradients and random numbers of the graph against Pyro's before the graph is used. A
    captured step does not validate; it warns of a NaN loss as Pyro does. `evaluate_loss` is stock.

    What the code of the programs names is looked up at every step: globals, closures, attributes of
    objects, modules and of the ELBO, hooks. A tensor there may be another one at every step, and so
    may a float; anything else that changes makes a graph of its own. Programs that change what they
    see (a counter, a list) or draw from other generators than torch's run eager.

    What cannot be looked up in bounded time is not: names that are put together at run time, files,
    the environment, what lies in containers of more than 256 elements or inside of libraries. For
    that, captured steps are held against Pyro again, after 1, 2, 4, 8, ... of them and at every
    1,000th; where they differ, the rest of the run is eager, and a warning says which steps may be
    wrong. What programs print or write to files is missing from captured steps.

    What cannot be captured runs as stock SVI, with one warning that says why. `engine` is
    "captured" or "eager": how the last step ran; `reason` says why not captured, where it is known.
    A copy, or what is read by `pickle`, captures anew.

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
        self.recordings = 0  # how often one was made

    def _begin(self) -> None:
        super()._begin()
        self._recordings: dict[Hashable, Recording] = {}
        self._zeros: dict[Tensor, tuple[Tensor, int]] = {}  # gradients after a step

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step, as `pyro.infer.SVI.step`; returns the estimate of the loss."""
        loss = self.launch(*args, **kwargs)
        return type(loss)(map(_read, loss)) if isinstance(loss, tuple) else _read(loss)

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """One step that is not waited for: a captured one's loss is a tensor where the step runs,
        to be summed there and read once in a while; an eager one's is a number, as `step`'s."""
        return self._call(args, kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures the step at these arguments before the first of them is taken.

        The programs run, so that parameters are made that are not there; but no parameter moves,
        and torch's random numbers go on as if nothing had been. Under the handlers (`pvae.temper`)
        and in the modes of the steps to come, every step with such arguments is captured then.

        Where a step with such arguments is captured already, nothing happens.

        Raises:
            NotCaptured: with `strict`, where the step cannot be captured.
        """
        try:
            private.check()
            signature = signature_of(args, kwargs)
        except NotCaptured as error:
            return self._refuse(str(error))
        entries = self._entries.setdefault(signature.key, [])
        if any(e.fits(signature) for e in entries if e.graph is not None or e.refused):
            return None
        seen = self._look()
        start = self._moment([*signature.tensors, *seen.tensors])
        try:
            with keeping_random_state():
                with called(self._modules):
                    self._reference(leaves_of(start), args, kwargs)
                start.put_back()
                entry = self._entry(signature)
                reason = self._captured(entry, signature, args, kwargs)[-1]
        finally:
            start.put_back()
        entry.refused = bool(reason)
        entries.insert(0, entry)
        if reason:
            self._refuse(reason)
        return None

    # ---- one step ----

    def _eager(self, args: Any, kwargs: Any) -> Any:
        return StockSVI.step(self, *args, **kwargs)

    def _replay(self, entry: Entry, inputs: list[Tensor]) -> Any:
        """Loss, gradients and the optimizer's step, as one recording where there is one."""
        graph = entry.graph

        def whole(given: list[Tensor]) -> list[Tensor]:
            rest = list(graph.rest)
            for i, t in zip(moving, given[len(inputs) :], strict=True):
                rest[i] = t
            results = graph(given[: len(inputs)], rest)
            self._apply(graph, results.gradients)
            return results.losses

        # what has been another tensor at another step is copied to its place, as the inputs are
        moving = [i for i, place in enumerate(graph.places) if place in entry.seen.moved]
        given = [*inputs, *(graph.rest[i] for i in moving)]
        step = self._recording(entry, whole, given, moving) if self.record is not None else whole
        return _loss(graph, step(given))

    def _recording(
        self,
        entry: Entry,
        whole: Callable[[list[Tensor]], list[Tensor]],
        given: list[Tensor],
        moving: list[int],
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        """The step as a recording; `whole`, where there is none."""
        graph, optimizer = entry.graph, self.optim.optimizer
        still = [t for i, t in enumerate(graph.rest) if i not in moving]
        own = [*graph.trained, *still]
        untouched = [p.grad is None or self._is_zero(p) for p in graph.trained]
        if not all(untouched) or graph.others:  # gradients of before are part of the step
            return whole
        key = id(graph), tuple(moving), tuple(p.grad is None for p in graph.trained)
        recording = self._recordings.get(key)
        if recording is None or not recording.fits(own, optimizer):
            if entry.replays <= _BEFORE_RECORDING:  # libraries set themselves up
                return whole
            recording = self._recorded(whole, graph, given, own)
            if recording is None:
                return whole
            self._recordings[key] = recording
        made = recording
        return lambda given: made(given, optimizer)

    def _apply(self, graph: _Graph, gradients: list[Tensor | None]) -> None:
        """The rest of a captured step: what stock SVI does with these gradients.

        Stock SVI leaves zeros behind, to which the next gradients are added; a parameter that gets
        none any more is trained on with zeros. The same zeros are used again at every step.
        """
        for t, gradient in zip((*graph.trained, *graph.others), gradients, strict=True):
            if t.grad is not None and self._is_zero(t) and gradient is not None:
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
        return p.grad is zero and (zero is None or zero._version == version)

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
        """The step as a recording; None, and no more of them, where that cannot be."""
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
                self._zero(p)  # made before, not among what is replayed
            return Recording(whole, arguments, own, self.optim.optimizer, self.record)
        except Exception as error:  # whatever the GPU says of these kernels
            for t, gradient in before.items():
                t.grad = gradient
            self.record = None
            self._refuse(in_words(error))
            return None

    # ---- capturing ----

    def _reference(self, leaves: list[Tensor], args: Any, kwargs: Any) -> _Outcome:
        """Stock SVI's step up to the optimizer's part. No gradient is left on a tensor."""
        before = {t: t.grad for t in leaves}
        for t in leaves:
            t.grad = None
        try:
            loss, sites = self._loss_and_sites(args, kwargs)
            trained = {site["value"].unconstrained() for site in sites.values()}
            gradients = {t: t.grad for t in {*leaves, *trained}}
            for t in trained:
                t.grad = None
        finally:
            for t, gradient in before.items():
                t.grad = gradient
        losses = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)
        return _Outcome(losses, trained, gradients)

    def _finish(self, outcome: _Outcome) -> Any:
        for t, gradient in outcome.gradients.items():
            _add_gradient(t, gradient)
        self.optim(outcome.trained)
        self._leave_zeros(outcome.trained)
        return outcome.losses

    def _try(self, graph: _Graph, inputs: list[Tensor]) -> _Results:
        return graph(inputs, graph.rest)

    def _accept(self, graph: _Graph, by_graph: _Results) -> Any:
        self._apply(graph, by_graph.gradients)
        return _loss(graph, by_graph.losses)

    def _difference(
        self, graph: _Graph, by_graph: _Results, outcome: _Outcome, moved: list[_Outcome]
    ) -> str | None:
        """What the graph and Pyro do not agree in, up to half of the digits and to what moved."""
        outcomes = [outcome, *moved]
        tensors = [*graph.trained, *graph.others]
        tolerance = resolution(tensors)
        losses = [o.losses if graph.is_tuple else (o.losses,) for o in outcomes]
        for ours, theirs, *others in zip(by_graph.losses, *losses, strict=True):
            loss = ours.item()
            slack = tolerance * max(abs(theirs), 1.0) + _largest(abs(v - theirs) for v in others)
            if not (abs(loss - theirs) <= slack or _as_odd(loss, theirs)):
                return "the loss"
        if set(graph.trained) != outcome.trained:
            return "the set of parameters"
        gradients = [[o.gradients.get(t) for o in outcomes] for t in tensors]
        total = sum(h.norm().item() ** 2 for h, *_ in gradients if h is not None) ** 0.5
        known = set(tensors)
        if any(g is not None and t not in known for t, g in outcome.gradients.items()):
            return "the set of tensors that get a gradient"
        names = [*graph.names, *("a tensor outside of Pyro's store" for _ in graph.others)]
        for name, g, (h, *near) in zip(names, by_graph.gradients, gradients, strict=True):
            if g is None and h is None:
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
        known = {id(t) for t in (*inputs, *trained)}
        rest = [t for t in found if id(t) not in known]
        others = [t for t in rest if t.requires_grad]
        if any(map(private.has_hooks, (*trained, *others))):
            raise NotCaptured("a hook is registered on a parameter")

        # ... and once as a function of them
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
            others=others,
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


def _read(loss: Any) -> Any:
    return warn_if_nan(torch_item(loss), "loss") if isinstance(loss, Tensor) else loss


def _loss(graph: _Graph, losses: list[Tensor]) -> Any:
    return tuple(losses) if graph.is_tuple else losses[0]


def _add_gradient(t: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        t.grad = gradient if t.grad is None else t.grad + gradient


def _largest(moves: Iterable[float]) -> float:
    """How far rounding may move a result, by how far it was moved."""
    return _ROUNDINGS * max([0.0, *moves])


def _as_odd(ours: Any, theirs: Any) -> bool:
    """Whether what is not finite is so in both, and the same."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    odd = ~(ours.isfinite() & theirs.isfinite())
    return bool(odd.any()) and torch.allclose(ours, theirs, rtol=1e-2, equal_nan=True)
