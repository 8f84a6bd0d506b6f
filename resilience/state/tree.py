"""How a nested tree of tensors and plain values is written as JSON, exactly and without pickle.

JSON's own values stand for themselves: None, bool, int below 2^63, finite float (Python's shortest form reads back to
the same bits, -0.0 included), str, list, and dict with str keys. Everything else is an object with one reserved entry,
whose name starts with `$`: `{"$tuple": [...]}`, `{"$tensor": "model/0/weight", "dtype": "bfloat16"}`. A dict with a key
that JSON cannot have, or that starts with `$`, is a list of pairs. Equal trees give equal bytes.

A tensor's bytes are not in here: the tree refers to an item by its key, which is the path to it, joined by `/` and
escaped as in JSON Pointer (`~0` for `~`, `~1` for `/`); a key of a dict that is no str is written `~(<its JSON>)`.

What comes back is what went in, type included, with three exceptions: a tensor that is part of an autograd graph comes
back without its history, an array in Fortran order in C order, and a value that hung in two places hangs there twice
(tensors that share all of their storage go on sharing it). `tree_decoder.py` is the way back.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from resilience.errors import UnsupportedStateError
from resilience.state.tensors import check_storable, dtype_name, is_dtensor, placement_names
from resilience.state.tree_decoder import FACTORIES, MAX_DEPTH, NUMPY_SCALARS, TENSOR_ARRAYS, decode

__all__ = ["MAX_DEPTH", "Written", "decode", "encode", "encode_around", "encode_part", "path_component"]

_WRITTEN = "$written"  # never left in a text
_HASHABLE = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset, torch.Size, torch.dtype, torch.device)
_FACTORY_NAMES = {factory: name for name, factory in FACTORIES.items()}


def encode(tree: Any) -> tuple[bytes, list[tuple[str, torch.Tensor]]]:
    """Write `tree` as JSON and list its tensors by key, in the order of the tree; the tensors are live, not copied.

    Raises UnsupportedStateError, with the path of the value, its type and what to do, for whatever would need pickle.
    """
    text, found = encode_part(tree, "", 0)
    return text.encode("ascii"), found


class Written:
    """A part of a tree that was written before, in its place: `text` is its JSON."""

    def __init__(self, text: str) -> None:
        self.text = text.encode("ascii")


def encode_around(tree: Any) -> tuple[bytes, list[tuple[str, torch.Tensor | Written]]]:
    """As `encode`, of a tree in which some parts are `Written`; they are listed in their order among the tensors."""
    text, found = encode_part(tree, "", 0)
    rest, parts = text.encode("ascii"), []
    for number, each in enumerate(each for _, each in found if isinstance(each, Written)):
        # no str of the tree can look like it (quotes in them are escaped), and they come in their order
        before, _, rest = rest.partition(b'{"%b":%d}' % (_WRITTEN.encode(), number))
        parts += [before, each.text]
    return b"".join([*parts, rest]), found


def encode_part(value: Any, path: str, depth: int) -> tuple[str, list[tuple[str, Any]]]:
    """Write what stands at `path` of a tree, under `depth` containers, as JSON, and list its tensors. As `encode`."""
    encoder = _Encoder()
    try:
        written = encoder.encode(value, path, depth)
        return json.dumps(written, allow_nan=False, separators=(",", ":")), encoder.tensors
    except RecursionError as error:  # a caller that is deep in calls of its own leaves less room than MAX_DEPTH needs
        raise UnsupportedStateError("The state is nested too deeply for what is left of the call stack.") from error


def path_component(key: str) -> str:
    """A str key of a dict as part of an item's key: `~` and `/` escaped as in JSON Pointer."""
    return key.replace("~", "~0").replace("/", "~1") if "~" in key or "/" in key else key


class _Encoder:
    """One walk over one tree; collects the tensors that it meets."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Any]] = []  # and parts that were written before
        self._parts = 0
        self._open: set[int] = set()  # containers between the root and here: meeting one again is a cycle

    def encode(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind is torch.Tensor:  # most of what there is: asked for first
            return self._tensor(value, path)
        if kind in _AS_THEY_ARE:
            return value
        if kind in _SIMPLE:
            return _SIMPLE[kind](value)
        if kind in _CONTAINERS:
            return self._container(value, kind, path, depth + 1)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, Written):
            self.tensors.append((path, value))
            self._parts += 1
            return {_WRITTEN: self._parts - 1}
        if isinstance(value, np.generic):
            return _numpy_scalar(value, path)
        if kind is np.ndarray:
            return self._array(value, path)
        return _refuse(value, path)

    def _container(self, value: Any, kind: type, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnsupportedStateError(
                f"{_shown(path)} lies more than {MAX_DEPTH} containers deep, which cannot be stored.",
                advice="Flatten it, or leave it out of the state.",
            )
        if id(value) in self._open:
            raise UnsupportedStateError(
                f"{_shown(path)} contains itself, which cannot be stored.", advice="Leave the reference back out."
            )
        self._open.add(id(value))
        written = _CONTAINERS[kind](self, value, path, depth)
        self._open.discard(id(value))
        return written

    def list_(self, value: Any, path: str, depth: int) -> list[Any]:
        if set(map(type, value)) == {int} and min(value) >= -(1 << 63) and max(value) < 1 << 63:
            return list(value)  # at once: the 625 words of Python's `random` cost as much as a hundred tensors
        if set(map(type, value)) == {str} and all(map(str.isascii, value)):
            return list(value)  # the names of an optimizer's parameters
        start = f"{path}/" if depth > 1 else ""  # the root has no name of its own
        return [self.encode(part, f"{start}{index}", depth) for index, part in enumerate(value)]

    def dict_(self, value: dict[Any, Any], path: str, depth: int) -> dict[str, Any]:
        start = f"{path}/" if depth > 1 else ""  # the root has no name of its own
        written: dict[str, Any] = {}
        for key in value:
            if type(key) is not str or key[:1] == "$" or (not key.isascii() and _has_surrogates(key)):
                return {"$dict": self.pairs(value, path, depth)}
        for key, part in value.items():
            written[key] = self.encode(part, start + path_component(key), depth)
        return written

    def pairs(self, value: dict[Any, Any], path: str, depth: int) -> list[list[Any]]:
        start = f"{path}/" if depth > 1 else ""  # the root has no name of its own
        written: list[list[Any]] = []
        for key, part in value.items():
            name = _key(key, path)
            if type(name) is str:
                component = path_component(name)
            else:
                component = f"~({path_component(json.dumps(name, separators=(',', ':')))})"
            written.append([name, self.encode(part, start + component, depth)])
        return written

    def ordered_dict(self, value: OrderedDict[Any, Any], path: str, depth: int) -> dict[str, Any]:
        written: dict[str, Any] = {"$ordered_dict": self.pairs(value, path, depth)}
        attributes = vars(value)
        if attributes.keys() - {"_metadata"}:
            return _refuse(value, path, f"OrderedDict with attributes ({', '.join(attributes)})")
        if attributes:  # a module's state_dict() carries its versions so
            written["metadata"] = self.encode(attributes["_metadata"], f"{path}/~(metadata)", depth)
        return written

    def default_dict(self, value: defaultdict[Any, Any], path: str, depth: int) -> dict[str, Any]:
        name = _FACTORY_NAMES.get(value.default_factory)
        if name is None:
            return _refuse(value, path, f"defaultdict with the factory {value.default_factory!r}")
        return {"$default_dict": self.pairs(value, path, depth), "factory": name}

    def set_(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        return {f"${type(value).__name__}": _sorted([_key(part, path) for part in value])}

    def _tensor(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        check_storable(_shown(path), tensor)
        written: dict[str, Any] = {"$tensor": path, "dtype": dtype_name(tensor.dtype)}
        if not tensor.is_cpu:
            written["device"] = tensor.device.type
        if type(tensor) is not torch.Tensor:
            if is_dtensor(tensor):
                written["placements"] = list(placement_names(path, tensor))
            if isinstance(tensor, torch.nn.Parameter):
                written["parameter"] = True
        if tensor.requires_grad and tensor.is_leaf:
            written["requires_grad"] = True
        self.tensors.append((path, tensor))
        return written

    def _array(self, array: np.ndarray[Any, Any], path: str) -> dict[str, Any]:
        dtype = array.dtype.str
        if dtype in TENSOR_ARRAYS:
            # torch cannot see a read-only array, nor one that runs backwards or in odd steps.
            steps = (step >= 0 and step % max(1, array.itemsize) == 0 for step in array.strides)
            if not array.flags.writeable or not all(steps):
                array = np.array(array, order="C", copy=True)
            tensor = torch.from_numpy(array)
        elif array.dtype.kind in "biufcMmSU" and array.dtype.char not in "gG":
            tensor = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else _no_bytes()
        else:
            return _refuse(array, path, f"numpy array of {array.dtype}")
        self.tensors.append((path, tensor))
        return {"$array": path, "dtype": dtype, "shape": list(array.shape)}


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _key(key: Any, path: str) -> Any:
    """A key of a dict or a member of a set: what is hashable by value, and nothing that holds a tensor."""
    kind = type(key)
    where = f"A key or member of {_shown(path)}"
    if not issubclass(kind, _HASHABLE):
        return _refuse(key, where)
    if kind is tuple:
        return {"$tuple": [_key(part, path) for part in key]}
    if kind is frozenset:
        return {"$frozenset": _sorted([_key(part, path) for part in key])}
    return _Encoder().encode(key, where, 0)


def _sorted(parts: list[Any]) -> list[Any]:
    # A set has no order of its own: it is written in that of the JSON, so that equal sets give equal bytes.
    return sorted(parts, key=json.dumps)


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _str(text: str) -> Any:
    # json joins two lone surrogates that happen to make a pair, so text that has any is written as its bytes.
    if not _has_surrogates(text):
        return text
    return {"$str": base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")}


def _int(number: int) -> Any:
    return number if -(1 << 63) <= number < 1 << 63 else {"$int": hex(number)}


def _float(number: float) -> Any:
    # Infinity, and the very not-a-number it was.
    return number if math.isfinite(number) else {"$float": struct.pack(">d", number).hex()}


def _complex(number: complex) -> Any:
    return {"$complex": struct.pack(">dd", number.real, number.imag).hex()}


def _numpy_scalar(value: np.generic, path: str) -> Any:
    dtype = value.dtype
    if dtype.kind not in NUMPY_SCALARS or dtype.char in "gG" or type(value) is not np.dtype(dtype.str).type:
        return _refuse(value, path, f"numpy scalar of {dtype}")
    return {"$scalar": value.tobytes().hex(), "dtype": dtype.str}


def _shown(path: str) -> str:
    return path or "The state"


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _refuse(value: Any, path: str, what: str = "") -> NoReturn:
    what = what or f"of type {_name(type(value))}"
    raise UnsupportedStateError(
        f"{_shown(path)} is {what}, which cannot be stored without pickle.",
        advice="Give it a state_dict of plain values and tensors (numbers, str, bytes, list, tuple, dict), convert it "
        "to one of these, or leave it out.",
    )


_AS_THEY_ARE = {type(None), bool}
_SIMPLE: dict[type, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    complex: _complex,
    str: _str,
    bytes: lambda value: {"$bytes": base64.b64encode(value).decode("ascii")},
    bytearray: lambda value: {"$bytearray": base64.b64encode(value).decode("ascii")},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
}
_CONTAINERS: dict[type, Callable[[_Encoder, Any, str, int], Any]] = {
    list: _Encoder.list_,
    tuple: lambda encoder, value, path, depth: {"$tuple": encoder.list_(value, path, depth)},
    dict: _Encoder.dict_,
    OrderedDict: _Encoder.ordered_dict,
    defaultdict: _Encoder.default_dict,
    set: _Encoder.set_,
    frozenset: _Encoder.set_,
}
