"""Says in plain words why a program could not be traced."""

import traceback

from pvae.captured import private
from pvae.captured.compiling import NotCaptured

_OF_PYTHON = "tensor subclass"  # in torch's error when values are passed to Python or NumPy
_OF_JIT = frozenset({"pyro.ops.jit", "torch.jit._trace", "torch._jit_internal"})


def is_of_tracing(error: Exception) -> bool:
    """Returns whether the error would not occur with tensors that have data."""
    return isinstance(error, (*private.NEEDS_VALUE, private.NEEDS_SHAPE)) or (
        _OF_PYTHON in str(error)
    )


def in_words(error: Exception) -> str:
    """Returns the reason for an error as one line."""
    if "convert all Tensors to FakeTensors" in str(error):
        return f"the programs copy a tensor, or call a function of C++ on it, in `{_where(error)}`"
    if isinstance(error, NotCaptured):
        return str(error).partition("\n")[0]  # Pyro adds lines about its sites
    if _is_of_jit(error):
        return (
            "the programs run code of torch.jit, which cannot be traced: take the ELBO without Jit"
        )
    if isinstance(error, private.NEEDS_VALUE):
        return f"the programs ask for the value of a tensor, in `{_where(error)}`"
    if isinstance(error, private.NEEDS_SHAPE):
        return f"the values of a tensor decide the shape of another, in `{_where(error)}`"
    text = str(error).strip().partition("\n")[0]
    if "SparseTensor" in text:
        return "the programs use a sparse tensor"
    if _OF_PYTHON in text:
        return f"the programs hand the values of a tensor to Python or NumPy, in `{_where(error)}`"
    return f"{type(error).__name__}: {text}"


def _is_of_jit(error: Exception) -> bool:
    """Returns whether the error comes from code of torch.jit, such as Pyro's Jit ELBOs."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_globals.get("__name__", "") for frame in frames]
    return bool(_OF_JIT.intersection(names))


def _where(error: Exception) -> str:
    """Returns the name of the innermost function of the programs, or of Pyro."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("torch", "contextlib") and not module.startswith(
            "pvae.captured"
        ):
            code = frame.f_code
            name = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on
    return name
