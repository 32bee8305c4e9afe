"""Compilers: they turn a traced graph into code that is called in its place."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import config
from torch.fx import GraphModule

from pvae.captured.products import amd_family, by_onednn

Run = Callable[..., Sequence[Any]]
Compiler = Callable[[GraphModule, list[Tensor]], Run]


class NotCaptured(RuntimeError):
    """The call cannot be captured; the message says why."""


def inductor(graph: GraphModule, inputs: list[Tensor]) -> Run:
    """Compiles a traced step with torch's inductor, and keeps torch's own random numbers.

    Inductor keeps compiled code in a folder (`TORCHINDUCTOR_CACHE_DIR`), so the next process with
    the same graph, torch, kind of processor and number of threads loads it and compiles nothing.

    Raises:
        NotCaptured: there is no C++ compiler.
    """
    _sum_for_biases(graph)
    _without_log1p(graph)
    by_onednn(graph, amd_family())
    # Inductor uses its folder only if the shapes come from tensors without data, on which the graph
    # was traced. A version of torch that keeps no such graphs compiles each of them again.
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    options = {
        "fallback_random": True,  # inductor's own generators give other noise
        # torch up to 2.12 would load code for another number of threads, which rounds otherwise
        "cpp.threads": torch.get_num_threads(),
    }
    # torch would load code for longer vectors than this processor's, and compute wrong numbers
    tag = f"{config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"
    try:
        with _without_cuda_home(), config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return torch._inductor.compile(graph, fakes, options=options)
    except Exception as error:
        if _has_cpp_compiler():
            raise
        raise NotCaptured(
            "a C++ compiler (g++) is needed to compile a step, and none was found"
        ) from error


def as_traced(graph: GraphModule, inputs: list[Tensor]) -> Run:
    """Returns a traced step without compiling it: it runs the same operators one by one."""
    return graph


def _has_cpp_compiler() -> bool:
    """Returns whether inductor finds the compiler that its settings and the variable CXX name.

    Private names of torch, tested with 2.14.1: the search, and the error that ends it. If one is
    missing, returns True, so that the user reads torch's own message.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:
        return True
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@contextlib.contextmanager
def _without_cuda_home() -> Iterator[None]:
    """Hides the line about the folder of CUDA that torch logs if there is no GPU.

    A private name of torch, tested with 2.14.1: the name of the logger. If torch changes it, the
    line is printed.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No CUDA runtime is found")

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _sum_for_biases(graph: GraphModule) -> None:
    """Computes the gradient of a convolution's bias by a sum, outside of oneDNN.

    It is the sum of the output's gradient over all dimensions but the channels. oneDNN's backward
    is up to a third slower if it has to return this gradient too.
    """
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


def _without_log1p(graph: GraphModule) -> None:
    r"""Computes the density of binary pixels by `log`, as `log1p` takes ten times as long.

    With logits `l` and `e = exp(-|l|)` it is `-log p = (1 - x) l + max(-l, 0) + log(1 + e)`. With
    `u = 1 + e`, rounded, `log1p(e) = log(u) e / (u - 1)` to the last digits. Source: Goldberg, What
    every computer scientist should know about floating-point arithmetic (1991), theorem 4.
    """

    def density(logits: Any, x: Any) -> Any:
        # functions, not methods: torch keeps no code of a graph that calls methods
        e = torch.exp(-torch.abs(logits))
        u = 1 + e
        log1p = torch.where(u == 1, e, torch.log(u) * e / (u - 1))
        return (1 - x) * logits - torch.clamp(logits, max=0) + log1p

    target = torch.ops.aten.binary_cross_entropy_with_logits.default
    for node in [n for n in graph.graph.nodes if n.target is target]:
        logits, x, *others = node.args
        if any(others[:2]) or others[2:] != [0]:  # weights, or a sum over pixels
            continue
        with graph.graph.inserting_before(node):
            by_hand = density(torch.fx.Proxy(logits), torch.fx.Proxy(x))
        node.replace_all_uses_with(by_hand.node)
        graph.graph.erase_node(node)
    graph.recompile()
