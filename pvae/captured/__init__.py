"""Traces plain Pyro programs once, compiles them, and then calls the code without Pyro's handlers.

`captured.SVI` is a drop-in for `pyro.infer.SVI`; `captured.Function` does the same for a function
of tensors, such as one that computes the importance weights of a batch.
"""

from pvae.captured.capturing import submodules
from pvae.captured.compiling import Compiler, NotCaptured, as_traced, inductor
from pvae.captured.function import Function
from pvae.captured.recording import cuda_graph
from pvae.captured.svi import SVI

__all__ = [
    "SVI",
    "Compiler",
    "Function",
    "NotCaptured",
    "as_traced",
    "cuda_graph",
    "inductor",
    "submodules",
]
