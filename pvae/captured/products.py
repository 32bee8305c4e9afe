"""Matrix products by oneDNN, on processors where it is faster than torch's own product."""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

# AMD's family of processors with whole AVX-512 units (Zen 5): there MKL's product, which torch
# calls, takes 1.6 to 2.1 times as long as oneDNN's. On family 25 (Zen 4) the two are within 7 %,
# and on processors with AVX2 alone oneDNN is slower. Measured: docs/speed.md.
_FASTER_ON = {26}
_LEAST = 2**24  # multiplications; a small product does not win back the cost of a call of oneDNN

aten = torch.ops.aten
_library = torch.library.Library("pvae", "DEF")
_library.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


# An operator of our own, to which inductor passes the factors without copies, transposed or not; to
# oneDNN's own operator it passes copies. A private name of torch, tested with 2.14.1:
# `_linear_pointwise`.
@torch.library.impl(_library, "product", "CPU")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


@torch.library.register_fake("pvae::product", lib=_library)
def _of_shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@functools.cache
def amd_family() -> int | None:
    """Returns the family of this processor if it is AMD's and has AVX-512; else None."""
    try:
        return amd_family_in(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def amd_family_in(said: str) -> int | None:
    """Returns the same as `amd_family`, from the text of `/proc/cpuinfo`.

    >>> amd_family_in("vendor_id : AuthenticAMD\\ncpu family : 26\\nflags : fma avx2 avx512f")
    26
    """
    family = re.search(r"^cpu family\s*: (\d+)$", said, re.MULTILINE)
    of_amd = "AuthenticAMD" in said and re.search(r"\bavx512f\b", said)
    return int(family[1]) if family and of_amd else None


def by_onednn(graph: GraphModule, family: int | None) -> None:
    """Replaces the large products of a traced step by oneDNN's, on a family where it is faster.

    Only processor and shape decide, so that a run is the same, bit for bit, each time. Only
    float32 products at full precision are replaced: at less precision torch itself takes oneDNN's.
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
    """Returns whether this is a product of large float32 matrices on a CPU."""
    left, right = a.meta["val"], b.meta["val"]
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (left, right))
        and left.shape[0] * left.shape[1] * right.shape[1] >= _LEAST
        and (bias is None or bias.meta["val"].shape == right.shape[1:])
    )
