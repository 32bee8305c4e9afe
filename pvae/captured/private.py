"""The doors of torch and Pyro that are not public, each with what it is for.

Tried with torch 2.14.1 and Pyro 1.9.2. Where a version has a door no longer, `MISSING` names it:
nothing is captured then, for that reason, and every call runs eager.
"""

import importlib
import sys
from typing import Any

import pyro
import torch

from pvae.captured.compiling import NotCaptured

MISSING: list[str] = []


def _door(path: str) -> Any:
    """What `path` names: a module, or what a module or a class holds."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
            for name in parts[i:]:
                found = getattr(found, name)
        except (ImportError, AttributeError):
            continue
        return found
    MISSING.append(path)
    return None


def check() -> None:
    """Refuses to capture where a door is missing.

    Raises:
        NotCaptured: in these versions of torch and Pyro.
    """
    if MISSING:
        raise NotCaptured(
            f"this version of torch or Pyro has no {', '.join(MISSING)}, which captured needs"
        )


# ---- torch ----

# nested lists, tuples and dictionaries of tensors, flat
pytree = _door("torch.utils._pytree")
# tensors that have shapes and no data: what programs are traced on
FakeTensor = _door("torch._subclasses.fake_tensor.FakeTensor")
FakeTensorMode = _door("torch._subclasses.fake_tensor.FakeTensorMode")
# from a function to a graph of torch's operators
make_fx = _door("torch.fx.experimental.proxy_tensor.make_fx")
# autocast off on every device: a graph says itself where it casts
DisableAutocast = _door("torch._C._DisableAutocast")
# `_is_compiling_flag` is what torch.compiler.is_compiling says
compiler = _door("torch.compiler")
_door("torch.compiler._is_compiling_flag")
# tensors inside torch.func.vmap
functorch = _door("torch._C._functorch")
_door("torch._C._functorch.is_batchedtensor")
_door("torch._C._functorch.get_unwrapped")
_door("torch._C._functorch.maybe_get_bdim")
_door("torch._C._functorch.maybe_get_level")
_door("torch._C._functorch._add_batch_dim")
# `Tensor.backward` itself, under a mode that sees what it calls
_ENGINE = _door("torch.autograd.Variable._execution_engine")
# `_get_mkldnn_enabled`, `_set_mkldnn_enabled`: the public switch warns on some machines
c = _door("torch._C")
_door("torch._C._set_mkldnn_enabled")
# the hooks that hold for all modules
_OF_ALL_MODULES = [
    _door(f"torch.nn.modules.module._global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
# what a tracer says of a program that asks for the value of a tensor, or whose shapes depend on one
NEEDS_VALUE = (
    _door("torch._subclasses.fake_tensor.DataDependentOutputException"),
    _door("torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode"),
)
NEEDS_SHAPE = _door("torch._subclasses.fake_tensor.DynamicOutputShapeException")
# functions that gradients are handed to
_door("torch.Tensor._backward_hooks")
_door("torch.Tensor._post_accumulate_grad_hooks")

# ---- Pyro ----

# the handlers around a call, the outermost first
runtime = _door("pyro.poutine.runtime")
_door("pyro.poutine.runtime._PYRO_STACK")
# `torch_isnan` looks at the values of tensors, for `warn_if_nan`
pyro_util = _door("pyro.util")
_door("pyro.util.torch_isnan")
# `Dice` looks whether any probability is 0, in order to leave those terms out
infer_util = _door("pyro.infer.util")
_door("pyro.infer.util._fulldot")
# the constraint of each parameter in the store
if not hasattr(pyro.get_param_store(), "_constraints"):
    MISSING.append("pyro.get_param_store()._constraints")
# notes from which sites a tensor comes
provenance = _door("pyro.ops.provenance")
_door("pyro.ops.provenance.extract_provenance.register")
_DICE = _door("pyro.infer.util.Dice.compute_expectation")
# laws look at values that they are asked the density of
_door("torch.distributions.Distribution._validate_sample")


# ---- through the doors ----


def global_hooks() -> list[Any]:
    """The hooks that torch calls for all modules."""
    return [hook for hooks in _OF_ALL_MODULES for hook in hooks.values()]


def has_hooks(t: Any) -> bool:
    """Whether a gradient of `t` is handed to a function on its way."""
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def asks_for_dice() -> bool:
    """Whether it is `Dice` that called the function of torch that called this."""
    return sys._getframe(2).f_code is _DICE.__code__


def constraints() -> dict[str, Any]:
    """Of the parameters in Pyro's store, by name."""
    return pyro.get_param_store()._constraints


def batched(t: Any, of_inside: Any) -> Any:
    """A tensor of `vmap` with another one inside."""
    inside = functorch.get_unwrapped(t)
    new = of_inside(inside)
    if new is inside:
        return t
    return functorch._add_batch_dim(new, functorch.maybe_get_bdim(t), functorch.maybe_get_level(t))


def backward(
    root: Any,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`root.backward(...)`."""
    gradient = torch.ones_like(root) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs or ())
    _ENGINE.run_backward(
        (root,),
        (gradient,),
        keep,
        create_graph,
        inputs,
        allow_unreachable=True,
        accumulate_grad=True,
    )
