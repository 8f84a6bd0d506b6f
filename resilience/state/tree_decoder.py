"""How the JSON of a tree is read back, given the tensors that it refers to.

The bytes come from a file or from a peer: whatever is wrong with them ends in CorruptCopyError, nothing else.
`tree.py` says what is written.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch

from resilience.errors import CorruptCopyError
from resilience.state.strict_json import json_of, not_parsed
from resilience.state.tensors import DTYPES, TensorRef

#: Containers within containers; what training state needs is about ten.
MAX_DEPTH = 100
# A level of the tree is up to three levels of JSON: the object with the tag, the list of pairs, the pair.
_MAX_JSON_DEPTH = 3 * MAX_DEPTH + 3

#: Factories of a defaultdict that are known by name.
FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    "bool": bool,
    "dict": dict,
    "float": float,
    "int": int,
    "list": list,
    "set": set,
    "str": str,
    "tuple": tuple,
}
#: numpy arrays that torch can look at in place; arrays of other plain dtypes are stored as bytes.
TENSOR_ARRAYS = {
    np.dtype(code).str: torch.from_numpy(np.zeros(0, dtype=code)).dtype
    for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}
#: Kinds of numpy scalars that are stored: bool, integers, floats, complex, dates and time spans.
NUMPY_SCALARS = "biufcMm"

_NUMPY_DTYPE = re.compile(r"[<>|=][biufcMmSU]\d{1,9}(\[\d{0,9}[A-Za-z]{1,7}\])?")
_MAX_ELEMENTS = 1 << 48
_DEVICE_KIND = re.compile(r"[a-z]{1,20}")


def decode(values: bytes, resolve: Callable[[str], torch.Tensor]) -> Any:
    """Read back what `encode` wrote; `resolve` gives the tensor for an item's key.

    A DTensor's key has to resolve to a DTensor. Raises CorruptCopyError for bytes that `encode` cannot have written,
    and where a tensor that `resolve` gives has another dtype than the one that was stored.
    """
    return decode_with(values, lambda ref: finished(ref, _resolved(ref, resolve)))


def decode_with(values: bytes, leaf: Callable[[TensorRef], Any]) -> Any:
    """Read the tree with `leaf(ref)` in each tensor's place."""
    try:
        return _Decoder(leaf).decode(json_of(values, _object), 0)
    except CorruptCopyError:
        raise
    except (ValueError, RecursionError) as error:
        raise not_parsed(error) from error


def finished(ref: TensorRef, tensor: torch.Tensor) -> Any:
    """What the tree holds for `ref`, made of the tensor with its bytes: tensor, Parameter or numpy array.

    Shares the storage of `tensor`.
    """
    if ref.numpy_dtype is not None:
        return _array(ref, tensor)
    if ref.parameter:
        return torch.nn.Parameter(tensor.detach(), requires_grad=ref.requires_grad)
    return tensor.detach().requires_grad_() if ref.requires_grad else tensor


def _resolved(ref: TensorRef, resolve: Callable[[str], torch.Tensor]) -> torch.Tensor:
    try:
        tensor = resolve(ref.key)
    except KeyError as error:
        raise CorruptCopyError(f"The values refer to {ref.key}, which the save does not hold.") from error
    if tensor.dtype != ref.dtype:
        raise CorruptCopyError(f"{ref.key} was stored as {ref.dtype}, what is there is {tensor.dtype}.")
    return tensor


def _array(ref: TensorRef, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array = tensor.detach().cpu().contiguous().reshape(-1).numpy()
    dtype = np.dtype(ref.numpy_dtype)
    expected = math.prod(ref.numpy_shape) * (1 if ref.numpy_dtype in TENSOR_ARRAYS else dtype.itemsize)
    if array.size != expected:
        raise CorruptCopyError(
            f"{ref.key} holds {array.size} elements, an array of {ref.numpy_shape} needs {expected}."
        )
    if dtype.itemsize == 0:  # arrays of empty strings have no bytes to look at
        return np.zeros(ref.numpy_shape, dtype)
    return array.view(dtype).reshape(ref.numpy_shape)


class _Decoder:
    def __init__(self, leaf: Callable[[TensorRef], Any]) -> None:
        self._leaf = leaf

    def decode(self, written: Any, depth: int) -> Any:
        if depth > _MAX_JSON_DEPTH:
            raise CorruptCopyError(f"The values of a save are nested more than {MAX_DEPTH} containers deep.")
        if type(written) is list:
            return [self.decode(part, depth + 1) for part in written]
        if type(written) is not dict:
            return written
        tag = next(iter(written), "")
        if not tag.startswith("$"):
            return {key: self.decode(part, depth + 1) for key, part in written.items()}
        if tag in _SIMPLE:
            kind, read = _SIMPLE[tag]
            body = _typed(_only(written, tag), kind, tag)
            try:
                return read(body)
            except (ValueError, struct.error, RuntimeError) as error:
                raise CorruptCopyError(f"No value is written as {tag} {str(body)[:80]!r}.") from error
        if tag in ("$tensor", "$array"):
            return self._leaf(_tensor_ref(written) if tag == "$tensor" else _array_ref(written))
        if tag == "$scalar":
            return _numpy_scalar(written)
        return self._container(tag, written, depth + 1)

    def _container(self, tag: str, written: dict[str, Any], depth: int) -> Any:
        body = _typed(written[tag], list, tag)
        extra = set(written) - {tag}
        if tag == "$ordered_dict" and extra <= {"metadata"}:
            ordered = OrderedDict(self._pairs(body, depth))
            if extra:
                ordered._metadata = self.decode(written["metadata"], depth)  # type: ignore[attr-defined]
            return ordered
        if tag == "$default_dict" and extra == {"factory"}:
            factory = _typed(written["factory"], str, "factory")
            if factory not in FACTORIES:
                raise CorruptCopyError(f"No defaultdict has a factory called {factory[:80]!r}.")
            return defaultdict(FACTORIES[factory], self._pairs(body, depth))
        if extra:
            raise CorruptCopyError(f"A value written as {tag} has entries that do not belong: {sorted(extra)[:5]}.")
        match tag:
            case "$tuple":
                return tuple(self.decode(part, depth) for part in body)
            case "$dict":
                return dict(self._pairs(body, depth))
            case "$set":
                return set(self._members(body, depth))
            case "$frozenset":
                return frozenset(self._members(body, depth))
        raise CorruptCopyError(f"No value is written as {tag[:80]!r}.")

    def _pairs(self, body: list[Any], depth: int) -> list[tuple[Hashable, Any]]:
        found: dict[Hashable, Any] = {}
        for pair in body:
            if type(pair) is not list or len(pair) != 2:
                raise CorruptCopyError("An entry of a dict is not written as a pair.")
            key = self._key(pair[0], depth + 1)
            # A list of pairs and a dict say the same only if no key comes twice; nan never equals itself, and may.
            if key in found:
                raise CorruptCopyError(f"A dict is written with the key {str(key)[:80]!r} twice.")
            found[key] = self.decode(pair[1], depth + 1)
        return list(found.items())

    def _members(self, body: list[Any], depth: int) -> list[Hashable]:
        return [self._key(part, depth) for part in body]

    def _key(self, written: Any, depth: int) -> Hashable:
        key = _Decoder(_no_leaf).decode(written, depth)
        try:
            hash(key)
        except TypeError as error:
            raise CorruptCopyError(
                f"A {type(key).__name__} is written as a key of a dict or a member of a set."
            ) from error
        return key  # type: ignore[no-any-return]


def _no_leaf(ref: TensorRef) -> Any:
    raise CorruptCopyError(f"{ref.key} is written as a key of a dict or a member of a set.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CorruptCopyError("An object in the values of a save has a name twice.")
    return found


def _typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise CorruptCopyError(f"{name} holds {type(value).__name__} where {kind.__name__} is expected.")
    return value


def _only(written: dict[str, Any], tag: str) -> Any:
    if len(written) != 1:
        raise CorruptCopyError(f"A value written as {tag} has entries that do not belong: {sorted(written)[:5]}.")
    return written[tag]


def _tensor_ref(written: dict[str, Any]) -> TensorRef:
    known = {"$tensor": str, "dtype": str, "device": str, "placements": list, "parameter": bool, "requires_grad": bool}
    for name, value in written.items():
        if name not in known:
            raise CorruptCopyError(f"A tensor is written with the entry {name[:80]!r}, which means nothing.")
        _typed(value, known[name], name)
    placements = written.get("placements")
    if placements is not None and not all(type(name) is str for name in placements):
        raise CorruptCopyError(f"The placements of {written['$tensor']} are not names.")
    device = written.get("device", "cpu")
    if _DEVICE_KIND.fullmatch(device) is None:
        raise CorruptCopyError(f"No kind of device is called {device[:80]!r}.")
    return TensorRef(
        key=written["$tensor"],
        dtype=_dtype(written.get("dtype", "")),
        device=device,
        placements=None if placements is None else tuple(placements),
        parameter=written.get("parameter", False),
        requires_grad=written.get("requires_grad", False),
    )


def _array_ref(written: dict[str, Any]) -> TensorRef:
    if set(written) != {"$array", "dtype", "shape"}:
        raise CorruptCopyError(f"An array is written with the entries {sorted(written)[:5]}.")
    key, shape = _typed(written["$array"], str, "$array"), _typed(written["shape"], list, "shape")
    dtype = _numpy_dtype(_typed(written["dtype"], str, "dtype"))
    if len(shape) > 64 or not all(type(length) is int and 0 <= length <= _MAX_ELEMENTS for length in shape):
        raise CorruptCopyError(f"{key} is written with a shape that no array has.")
    kind = TENSOR_ARRAYS.get(dtype.str, torch.uint8)
    return TensorRef(key=key, dtype=kind, numpy_dtype=dtype.str, numpy_shape=tuple(shape))


def _numpy_scalar(written: dict[str, Any]) -> Any:
    if set(written) != {"$scalar", "dtype"}:
        raise CorruptCopyError(f"A numpy scalar is written with the entries {sorted(written)[:5]}.")
    dtype = _numpy_dtype(_typed(written["dtype"], str, "dtype"))
    content = _unhex(_typed(written["$scalar"], str, "$scalar"))
    if dtype.kind not in NUMPY_SCALARS or len(content) != dtype.itemsize:
        raise CorruptCopyError(f"A numpy scalar of {dtype} is written as {len(content)} bytes.")
    return np.frombuffer(content, dtype)[0]


def _numpy_dtype(name: str) -> np.dtype[Any]:
    try:
        if _NUMPY_DTYPE.fullmatch(name):
            return np.dtype(name)
    except TypeError:
        pass  # falls through to the error below, like a name that does not look like one
    raise CorruptCopyError(f"No numpy dtype is written as {name[:80]!r}.")


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise CorruptCopyError(f"{text[:80]!r} is not hexadecimal.") from error


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CorruptCopyError(f"No dtype of this torch ({torch.__version__}) is called {name[:80]!r}.")
    return DTYPES[name]


def _any_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(name)
    return dtype


def _size(lengths: list[Any]) -> torch.Size:
    if not all(type(length) is int and abs(length) < 1 << 63 for length in lengths):
        raise ValueError(lengths)
    return torch.Size(lengths)


def _base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


#: Values that hold no others: what their body is in JSON, and how it is read.
_SIMPLE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "$int": (str, lambda text: int(text, 16)),
    "$float": (str, lambda text: struct.unpack(">d", bytes.fromhex(text))[0]),
    "$complex": (str, lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text)))),
    "$str": (str, lambda text: _base64(text).decode("utf-8", "surrogatepass")),
    "$bytes": (str, _base64),
    "$bytearray": (str, lambda text: bytearray(_base64(text))),
    "$size": (list, _size),
    "$dtype": (str, _any_dtype),
    "$device": (str, torch.device),
}
