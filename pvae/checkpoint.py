"""Checkpoints: written atomically, read safely (tensors and plain values only).

Format 2 keeps a `Recipe`. Format 1, of version 0.1, kept the arguments of its `build`; `read`
converts it to format 2. A pair to pass on may also be saved as a safetensors file, which other
programs can read; the formats of these files have their own numbers.
"""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pvae.builder import NETS, PRIORS, Recipe, compose, number_of_parameters
from pvae.files import write_atomically
from pvae.untrusted import JSON_BYTES, Named, check_pickle
from pvae.vae import VAE

FORMAT = 2
SAFETENSORS_FORMAT = 1

# the names that a pickle of tensors and plain values needs; for a storage, the bytes of an element
_BYTES = {
    **{f"torch {name}Storage": 1 for name in ("Bool", "Byte", "Char")},
    **{f"torch {name}Storage": 2 for name in ("BFloat16", "Half", "Short")},
    **{f"torch {name}Storage": 4 for name in ("Float", "Int")},
    **{f"torch {name}Storage": 8 for name in ("ComplexFloat", "Double", "Long")},
}
_NAMES = {
    *("collections OrderedDict", "torch Size", *_BYTES),
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2"),
}


def write(
    path: str | os.PathLike[str], state: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Writes a mapping of tensors and plain values with its checksum, atomically.

    If `previous` is given, an existing file at `path` is kept there.

    Raises:
        OSError: the file cannot be written; the existing files then stay unchanged.
    """
    state = {"format": FORMAT, **state}
    # in memory first: torch hides the error of a full disk
    buffer = io.BytesIO()
    torch.save({**state, "checksum": checksum(state)}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()), previous)


def checksum(state: Mapping[str, Any]) -> int:
    """The CRC-32 of all names, tensors and values of a state.

    >>> checksum({"a": torch.zeros(2)}) == checksum({"a": torch.tensor([0.0, 1e-38])})
    False
    """
    crc = 0
    for part in _bytes(state):
        crc = zlib.crc32(part, crc)
    return crc


def _bytes(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield repr(name).encode()
            yield from _bytes(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _bytes(item)
    else:
        yield repr(value).encode()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, without running any code in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of this package.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    open_format = _is_safetensors(path)
    newest = SAFETENSORS_FORMAT if open_format else FORMAT
    try:
        state = _from_safetensors(path) if open_format else _from_torch(path)
    except Exception as error:
        # torch, zipfile, safetensors and the unpickler raise many errors for a damaged file
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    number = state.get("format") if isinstance(state, dict) else None
    if type(number) is not int or number < 1:
        raise ValueError(f"{path} is not a checkpoint of pvae")
    if number > newest:
        raise ValueError(
            f"{path} was written by a later version of pvae: its format is {number}, and this "
            f"version reads formats up to {newest}. Update pvae"
        )
    if number == newest:
        if state.pop("checksum", None) not in (None, checksum(state)):
            raise ValueError(f"{path} is damaged: its content does not have its writer's checksum")
        return state
    try:
        return _from_format_1(state)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a damaged checkpoint of format 1: {error!r}") from error


def _from_torch(path: str | os.PathLike[str]) -> Any:
    _check_archive(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    _check_tensors(state)
    return state


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".safetensors"


def _to_safetensors(state: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file: the tensors of a pair, sorted by name, and the rest of the
    state as JSON in the header, under "pvae"."""
    # copies, as the format has neither views nor two names for one tensor
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in sorted(state["model"].items())
    }
    rest = {"format": SAFETENSORS_FORMAT, **state, "model": None}
    rest["checksum"] = checksum({**rest, "model": tensors})
    return safetensors.torch.save(tensors, {"format": "pt", "pvae": json.dumps(rest)})


def _from_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `_to_safetensors` wrote; for a later format only the state in its header."""
    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    most = min(len(content) - 8, JSON_BYTES)
    if length > most:
        raise ValueError(f"its header must have at most {most:,} bytes, not {length:,}")
    state: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["pvae"])
    if state["format"] != SAFETENSORS_FORMAT:
        return state
    # the library compares the size that each tensor claims with the bytes of the file
    tensors = safetensors.torch.load(content)
    if isinstance(state["recipe"], dict):  # JSON has no tuples
        state["recipe"] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in state["recipe"].items()
        }
    return {**state, "model": dict(sorted(tensors.items()))}


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Checks an archive before torch reads it.

    Its entries must not claim more bytes than the file has, and its pickle must not name more than
    tensors and plain values need.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        size = os.fstat(file.fileno()).st_size
        claimed = sum(entry.file_size for entry in entries)
        if claimed > size or any(entry.compress_type for entry in entries):
            raise ValueError(
                f"its entries must be stored as they are, in its {size:,} bytes; unpacked they "
                f"claim {claimed:,}"
            )
        file.seek(-22, os.SEEK_END)
        if file.read(4) != b"PK\5\6":  # else zipfile and torch might find two directories
            raise ValueError("nothing must follow its directory")
        names = [entry.filename for entry in entries]
        if len({name.lower() for name in names}) < len(names):  # torch ignores case
            raise ValueError("two of its entries have one name")
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        content = archive.read(pickled)
        check_pickle(content, _NAMES.__contains__, protocol=2)
        folder = pickled.removesuffix(".pkl")
        _Claims(content, {e.filename: e.file_size for e in entries}, folder).load()


class _Claims(pickle.Unpickler):
    """Reads a pickle with stand-ins for all that it names, and compares the bytes that each storage
    claims with the bytes of its entry; torch itself does so only from version 2.10 on."""

    def __init__(self, content: bytes, sizes: Mapping[str, int], folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._sizes, self._folder = sizes, folder

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if name == "OrderedDict" else _BYTES.get(f"{module} {name}", Named)

    def persistent_load(self, claim: Any) -> None:
        _, item_bytes, key, _, numel = claim
        if (type(item_bytes), type(key), type(numel)) != (int, str, int):
            raise ValueError("a storage must be named by its kind, a text and a number")
        claimed, held = item_bytes * numel, self._sizes.get(f"{self._folder}/{key}", 0)
        if claimed != held:
            raise ValueError(f"a storage claims {claimed:,} bytes, but it has {held:,}")


def _check_tensors(state: Any) -> None:
    """Refuses a view larger than its storage, such as one number expanded a million times."""
    seen, left = set(), [state]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if claimed > held:
                raise ValueError(f"a tensor claims {claimed:,} bytes of {held:,}")
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def _from_format_1(state: dict[str, Any]) -> dict[str, Any]:
    for row in state.get("history", []):
        row["train_objective"] = row.pop("train_elbo")
    old = state.get("recipe")
    if old is not None:
        old["event_shape"] = tuple(old.pop("image_shape"))
        top = old.pop("top_dim")
        old["latent_dims"] = (old.pop("latent_dim"), *(() if top is None else (top,)))
        # format 1 kept these arguments also for parts that do not use them
        if NETS[old["net"]].hidden is None and top is None:
            old["hidden"] = None
        if PRIORS[old["prior"]].components is None:
            old["components"] = None
    return state


def pair_state(vae: VAE) -> dict[str, Any]:
    """The weights and the recipe of a pair, as tensors and plain values.

    >>> import pvae
    >>> pair_state(pvae.build((1, 8, 8), latent_dim=2))["recipe"]["latent_dims"]
    (2,)
    """
    recipe = None if vae.recipe is None else asdict(vae.recipe)
    return {"model": vae.state_dict(), "recipe": recipe}


def save(
    vae: VAE,
    path: str | os.PathLike[str],
    notes: Mapping[str, float] | None = None,
    *,
    data: str | None = None,
) -> None:
    """Saves a pair with its recipe, so that `load` can build it again.

    A path that ends in `.safetensors` makes a file of that format; any other path, one of torch's.

    Args:
        vae: the pair. A pair that was composed by hand has no recipe: only its tensors are kept.
        path: the file to write.
        notes: numbers to keep in the same file.
        data: the name of the data that the pair was trained on, also kept: `read` returns it.

    Raises:
        OSError: the file cannot be written; an existing file then stays unchanged.

    >>> import pvae, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pvae.save(pvae.build((1, 8, 8), latent_dim=2), f"{folder}/a.safetensors", data="digits")
    ...     pvae.load(f"{folder}/a.safetensors").recipe.latent_dims
    ...     read(f"{folder}/a.safetensors")["data"]
    (2,)
    'digits'
    """
    state = {**pair_state(vae), **(notes or {}), **({} if data is None else {"data": data})}
    if _is_safetensors(path):
        content = _to_safetensors(state)
        write_atomically(path, lambda file: file.write(content))
    else:
        write(path, state)


def restore(module: nn.Module, state: Mapping[str, Tensor], source: object = "state") -> None:
    """Loads parameters and buffers into `module`: all of them or, on any mismatch, none.

    Raises:
        ValueError: the state is of another architecture; the message names the tensors that differ.

    >>> restore(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "net.pt")
    Traceback (most recent call last):
    ValueError: net.pt is a checkpoint of another architecture:
      weight: (4, 2) saved, (3, 2) needed
      bias: (4,) saved, (3,) needed
    """
    own = module.state_dict()
    lines = []
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must hold a mapping of tensors by name, not {type(state)}")
    for name in [*own, *(name for name in state if name not in own)]:
        saved, needed = _kept(state, name), _kept(own, name)
        if saved != needed:
            lines.append(f"  {name}: {saved} saved, {needed} needed")
    if lines:
        if len(lines) > 6:
            lines[6:] = [f"  and {len(lines) - 6} more"]
        raise ValueError("\n".join([f"{source} is a checkpoint of another architecture:", *lines]))
    module.load_state_dict(state)


def _kept(state: Mapping[str, Any], name: str) -> str:
    """Describes the entry of a name in a state: its shape, and its dtype unless it is a float."""
    if name not in state:
        return "not"
    value = state[name]
    if not isinstance(value, Tensor):
        return f"no tensor but {type(value).__name__}"
    kind = "" if value.is_floating_point() else f" of {value.dtype}"
    return f"{tuple(value.shape)}{kind}"


def load(path: str | os.PathLike[str], *, max_parameters: int = 10**9) -> VAE:
    """Builds the VAE of a checkpoint, or of a run folder (its best model), in eval mode.

    No code in the file is run. Before the networks get any memory, the recipe is checked: `build`
    must accept it, and it may make at most `max_parameters` parameters, and no more than the file
    can hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of a VAE made by `build`, or its VAE has more
            parameters than `max_parameters`.

    >>> import pvae, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(pvae.build((1, 8, 8), latent_dim=2), f"{folder}/a.pt")
    ...     load(f"{folder}/a.pt").training
    False
    """
    file = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    state = read(file)
    if not isinstance(state.get("recipe"), dict):
        raise ValueError(
            f"{file} holds no recipe: its VAE was composed by hand; build it again, and hand the "
            "state to pvae.checkpoint.restore"
        )
    try:
        vae = compose(_affordable(Recipe(**state["recipe"]), os.path.getsize(file), max_parameters))
    except TypeError as error:
        raise ValueError(f"{file} was written by another version of pvae: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} holds a recipe that cannot be used: {error}") from error
    restore(vae, state.get("model", {}), file)
    return vae.eval()


def _affordable(recipe: Recipe, size: int, max_parameters: int) -> Recipe:
    """The recipe; raises ValueError if it makes more parameters than `max_parameters`, or than the
    file has bytes (`size`)."""
    needed = number_of_parameters(recipe)
    if needed > max_parameters:
        raise ValueError(
            f"max_parameters must be at least {needed:,}, those of the recipe, not "
            f"{max_parameters:,}: raise it if you trust the file"
        )
    if needed > size:
        raise ValueError(f"it makes {needed:,} parameters, but the file has {size:,} bytes")
    return recipe
