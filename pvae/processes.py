"""Several processes that train one pair: each takes its part of a batch, and sums are over all.

`torchrun` starts the processes and gives each its rank in the environment; `start` joins them into
a group. In a program of one process there is no group, and these functions change nothing. Those
that communicate raise ConnectionError if another process has ended or does not answer.
"""

import atexit
import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 60.0  # seconds that a process waits for the others

T = TypeVar("T")


def start(device: torch.device, timeout: float = TIMEOUT) -> torch.device:
    """Joins the group of the processes that `torchrun` started; returns this process's device.

    The process leaves the group when the program ends.

    Args:
        device: the device of all processes: the CPU (by gloo), or "cuda" (by NCCL), which gives
            each process its own GPU.
        timeout: the seconds to wait for another process, before the run ends.

    Raises:
        ValueError: several processes cannot use the device, or there are more processes than GPUs.
        ConnectionError: another process does not answer.

    >>> start(torch.device("cpu"))
    device(type='cpu')
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda for several processes, not {device.type}")
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"--nproc-per-node must be at most {there}, the number of GPUs here, not "
                f"{os.environ['LOCAL_WORLD_SIZE']}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    with _answered():
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", timeout=timedelta(seconds=timeout)
        )
    atexit.register(_end)
    return device


def _end() -> None:
    """Leaves the group when the program ends, and ignores SIGTERM meanwhile: a signal now would
    leave the threads of the group running, and they would abort the process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another process failed
    stop()


def stop() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # the group's threads must end before Python does


def count() -> int:
    """The number of processes.

    >>> count()
    1
    """
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, counted from 0.

    >>> rank()
    0
    """
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the first process, the one that writes and prints.

    >>> is_first()
    True
    """
    return rank() == 0


def part(n: int) -> slice:
    """This process's share of `n` items.

    The shares of all processes, in the order of their ranks, cover all items; their sizes differ by
    at most 1.

    >>> part(10)
    slice(0, 10, None)
    """
    size, more = divmod(n, count())
    begin = rank() * size + min(rank(), more)
    return slice(begin, begin + size + (rank() < more))


def seed(base: int, step: int = 0) -> int:
    """The seed of this process's own noise at a step; `base` if there is only one process.

    >>> seed(3)
    3
    """
    if count() == 1:
        return base
    return int(np.random.SeedSequence((base, step, rank(), count())).generate_state(1)[0])


def total(number: float) -> float:
    """The sum of `number` over all processes.

    >>> total(2.5)
    2.5
    """
    if count() == 1:
        return number
    return _summed(torch.tensor(number, dtype=torch.float64, device=_device())).item()


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process.

    >>> any_of(True, False)
    [True, False]
    """
    if count() == 1:
        return list(flags)
    return _summed(torch.tensor(flags, dtype=torch.float64, device=_device())).bool().tolist()


def gather(found: Tensor, n: int) -> Tensor:
    """All `n` rows `(n, ...)`; each process gives the rows of its `part(n)`.

    >>> gather(torch.ones(3), 3)
    tensor([1., 1., 1.])
    """
    if count() == 1:
        return found
    rows = found.new_zeros(n, *found.shape[1:])
    rows[part(n)] = found
    return _summed(rows)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces each gradient by its sum over all processes, with one all-reduce.

    All processes must give the same parameters in the same order. A process without a gradient for
    a parameter adds zeros to the sum.
    """
    if count() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sums = _summed(torch.cat([g.reshape(-1) for g in gradients]))  # in index, not memory, order
    for p, g in zip(parameters, sums.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view(p.shape).to(p.dtype)


def from_first(make: Callable[[], T]) -> T:
    """Runs `make()` on the first process; all processes return its result, or raise its error.

    >>> from_first(lambda: "runs/a")
    'runs/a'
    """
    if count() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_first():
        try:
            made[0] = make()
        except Exception as error:  # the others wait for the first, and must stop too
            made[1] = error
    with _answered():
        dist.broadcast_object_list(made, device=_device())
    if made[1] is not None:
        raise made[1]
    return made[0]


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives the tensors of all processes the values that they have on the first process."""
    if count() == 1:
        return
    for tensor in tensors:
        value = tensor.detach().contiguous()
        with _answered():
            dist.broadcast(value, 0)
        tensor.detach().copy_(value)


def wait() -> None:
    """Waits until all processes have called this function."""
    if count() > 1:
        with _answered():
            dist.barrier()


def _summed(tensor: Tensor) -> Tensor:
    with _answered():
        dist.all_reduce(tensor)
    return tensor


def _device() -> torch.device:
    """The device on which the group communicates."""
    gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise it for a lost connection
        raise ConnectionError(
            "another process of this run has ended, or does not answer: its output, if any, gives "
            f"the reason ({str(error).splitlines()[0]})"
        ) from error
