"""The private names of torch and Pyro that capture needs, each with its purpose.

Tested with torch 2.14.1 and Pyro 1.9.2. If another version lacks a name, the name is in `MISSING`:
then every call runs eager, and the reason says so.
"""

import importlib
import sys
from typing import Any

import pyro
import torch

from pvae.captured.compiling import NotCaptured

MISSING: list[str] = []
_CPU = torch.device("cpu")


def _door(path: str) -> Any:
    """Returns the object at `path`; if there is none, returns None and adds `path` to `MISSING`."""
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
    """Checks that no private name is missing.

    Raises:
        NotCaptured: this version of torch or Pyro lacks one.
    """
    if MISSING:
        raise NotCaptured(
            f"this version of torch or Pyro has no {', '.join(MISSING)}, which captured needs"
        )


# ---- torch ----

# makes a flat list of nested lists, tuples and dictionaries of tensors
pytree = _door("torch.utils._pytree")
# tensors with shapes but no data, on which programs are traced
FakeTensor = _door("torch._subclasses.fake_tensor.FakeTensor")
FakeTensorMode = _door("torch._subclasses.fake_tensor.FakeTensorMode")
# traces a function to a graph of torch's operators
make_fx = _door("torch.fx.experimental.proxy_tensor.make_fx")
# turns tracing off inside a block
without_modes = _door("torch.utils._python_dispatch._disable_current_modes")
# turns autocast off on every device: a graph has the casts of autocast itself
DisableAutocast = _door("torch._C._DisableAutocast")
# `_is_compiling_flag` is the result of `torch.compiler.is_compiling`
compiler = _door("torch.compiler")
_door("torch.compiler._is_compiling_flag")
# tensors inside the transforms of torch.func
functorch = _door("torch._C._functorch")
_door("torch._C._functorch.is_batchedtensor")
_door("torch._C._functorch.get_unwrapped")
_door("torch._C._functorch.maybe_get_bdim")
_door("torch._C._functorch.maybe_get_level")
_door("torch._C._functorch._add_batch_dim")
_door("torch._C._functorch.is_gradtrackingtensor")
_door("torch._C._functorch._wrap_for_grad")
outside_transforms = _door("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
# runs a backward pass like `Tensor.backward`, which a mode would handle once more
_ENGINE = _door("torch.autograd.Variable._execution_engine")
# `_get_mkldnn_enabled`, `_set_mkldnn_enabled`: the public switch warns on some machines
c = _door("torch._C")
_door("torch._C._set_mkldnn_enabled")
# the hooks that hold for all modules
_OF_ALL_MODULES = [
    _door(f"torch.nn.modules.module._global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
# errors of a tracer: a program asks for the value of a tensor, or a shape depends on such a value
NEEDS_VALUE = (
    _door("torch._subclasses.fake_tensor.DataDependentOutputException"),
    _door("torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode"),
)
NEEDS_SHAPE = _door("torch._subclasses.fake_tensor.DynamicOutputShapeException")
# hooks: functions that torch calls with a gradient
_door("torch.Tensor._backward_hooks")
_door("torch.Tensor._post_accumulate_grad_hooks")

# ---- Pyro ----

# the handlers around a call, the outermost first
runtime = _door("pyro.poutine.runtime")
_door("pyro.poutine.runtime._PYRO_STACK")
# `torch_isnan` looks at the values of tensors, for `warn_if_nan`
pyro_util = _door("pyro.util")
_door("pyro.util.torch_isnan")
# `Dice` leaves out terms of probability 0, and so looks for them
infer_util = _door("pyro.infer.util")
_door("pyro.infer.util._fulldot")
# the constraint of each parameter in the store
if not hasattr(pyro.get_param_store(), "_constraints"):
    MISSING.append("pyro.get_param_store()._constraints")
# notes on each tensor: the sites that it comes from
provenance = _door("pyro.ops.provenance")
_door("pyro.ops.provenance.extract_provenance.register")
_DICE = _door("pyro.infer.util.Dice.compute_expectation")
# distributions check a value before they compute its density
_door("torch.distributions.Distribution._validate_sample")
# transforms keep the tensors of their last call
_door("torch.distributions.Transform._inv_call")


# the modes of torch that are on, which change what its functions do
_function_modes = _door("torch.overrides._get_current_function_mode_stack")
_dispatch_modes = _door("torch._C._len_torch_dispatch_stack")
# what `saved_tensors_hooks` and `save_on_cpu` set
_saved_hooks = _door("torch._C._autograd._top_saved_tensors_default_hooks")
# the mode of `torch.set_default_device`
_DeviceContext = _door("torch.utils._device.DeviceContext")

# ---- functions that use them ----


def children(structure: Any) -> list[Any]:
    """Returns the parts of a structure of `pytree`."""
    is_new = hasattr(structure, "children")  # torch 2.8 has only the other name
    return structure.children() if is_new else structure.children_specs


def global_hooks() -> list[Any]:
    """Returns the hooks that torch calls for all modules."""
    return [hook for hooks in _OF_ALL_MODULES for hook in hooks.values()]


def has_mode() -> bool:
    """Returns whether a mode of torch is on other than that of the default device, or a hook."""
    others = [m for m in _function_modes() if not isinstance(m, _DeviceContext)]
    return bool(others) or _dispatch_modes() > 0 or _saved_hooks(True) is not None


def default_device() -> torch.device:
    """Returns the same as `torch.get_default_device`, which is slow: no mode means the CPU."""
    return torch.get_default_device() if _function_modes() else _CPU


def has_hooks(t: Any) -> bool:
    """Returns whether a hook gets the gradient of `t`."""
    return bool(t._backward_hooks or t._post_accumulate_grad_hooks)


def asks_for_dice() -> bool:
    """Returns whether `Dice` called the torch function that is being handled."""
    return sys._getframe(2).f_code is _DICE.__code__


def constraints() -> dict[str, Any]:
    """Returns the constraints of the parameters in Pyro's store, by name."""
    return pyro.get_param_store()._constraints


def wrapped(t: Any, of_inside: Any) -> Any:
    """Applies `of_inside` to the tensor inside a tensor of `vmap`, `grad` or `jacrev`."""
    inside, level = functorch.get_unwrapped(t), functorch.maybe_get_level(t)
    new = of_inside(inside)
    if new is inside:
        return t
    if functorch.is_gradtrackingtensor(t):
        return functorch._wrap_for_grad(new, level)
    return functorch._add_batch_dim(new, functorch.maybe_get_bdim(t), level)


def backward(
    root: Any,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Does the same as `root.backward(...)`."""
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
