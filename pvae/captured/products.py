"""Matrix products by oneDNN, where it is faster than the library that torch takes."""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# Of AMD's families of processors those with whole AVX-512 units (Zen 5): there MKL's product, which
# is torch's, takes 1.6 to 2.1 times as long. On family 25 (Zen 4) the two are within 7 %, and on
# processors with AVX2 alone oneDNN is slower. Measured: docs/speed.md.
_FASTER_ON = {26}
_LEAST = 2**24  # multiplications; small products do not win back what a call of oneDNN costs

aten = torch.ops.aten
_library = torch.library.Library("pvae", "DEF")
_library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


# One operator, so that inductor hands the factors over as they lie, transposed or not: to oneDNN's
# own operator it gives copies. A private door of torch, tried with 2.14.1: `_linear_pointwise`.
@torch.library.impl(_library, "product", "CPU")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


@torch.library.register_fake("pvae::product", lib=_library)
def _of_shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@functools.cache
def amd_family() -> int | None:
    """The family of this processor, where AMD made it and it has AVX-512."""
    try:
        return amd_family_in(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def amd_family_in(said: str) -> int | None:
    """The same of what Linux says of a processor.

    >>> amd_family_in("vendor_id : AuthenticAMD\\ncpu family : 26\\nflags : fma avx2 avx512f")
    26
    """
    family = re.search(r"^cpu family\s*: (\d+)$", said, re.MULTILINE)
    of_amd = "AuthenticAMD" in said and re.search(r"\bavx512f\b", said)
    return int(family[1]) if family and of_amd else None


def by_onednn(graph: GraphModule, family: int | None) -> None:
    """Takes oneDNN's product in a traced step for each one that it is faster at.

    Processor and shape alone decide, so that a run is the same, bit for bit, each time. In float32
    and at full precision only: below it, torch takes oneDNN's by itself.
    """
    if (
        family not in _FASTER_ON
        or torch.get_float32_matmul_precision() != "highest"
        or not torch.backends.mkldnn.enabled
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
            bias, a, b = node.args
        else:
            continue
        if _is_large(a, b, bias):
            node.target, node.args = torch.ops.pvae.product.default, (a, b, bias)
    graph.recompile()


def _is_large(a: Node, b: Node, bias: Node | None) -> bool:
    """Whether it is a product of large float32 matrices on a CPU."""
    left, right = a.meta["val"], b.meta["val"]
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (left, right))
        and left.shape[0] * left.shape[1] * right.shape[1] >= _LEAST
        and (bias is None or bias.meta["val"].shape == right.shape[1:])
    )
