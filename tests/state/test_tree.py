"""Trees of training state come back exactly as they were, and nothing that would need pickle gets in."""

from __future__ import annotations

import enum
import json
import math
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import CorruptCopyError, UnsupportedStateError
from resilience.state import decode, encode
from resilience.state.tensors import DTYPES, byte_view
from resilience.state.tree import MAX_DEPTH
from tests.state.equal import same


def round_trip(tree: Any) -> Any:
    values, tensors = encode(tree)
    keys = [key for key, _ in tensors]
    assert len(set(keys)) == len(keys)
    for key in keys:
        key.encode("utf-8")  # an item's key goes into a file's header
    found = dict(tensors)
    return decode(values, lambda key: found[key].detach().clone())


def nested(depth: int) -> Any:
    tree: Any = 0
    for _ in range(depth):
        tree = [tree]
    return tree


# -- what comes back ------------------------------------------------------------------------------------------------

any_text = st.text(st.characters(), max_size=8) | st.text("$~/()\ud800\udc00é\0", max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.complex_numbers()
    | any_text
    | st.binary(max_size=12)
)
keys = st.recursive(scalars, lambda part: st.tuples(part, part) | st.frozensets(part, max_size=2), max_leaves=3)
tensors = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape), dtype=torch.int32).to(dtype).reshape(shape),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([(), (0,), (3,), (2, 0), (2, 3)]),
)
arrays = npst.arrays(
    npst.boolean_dtypes()
    | npst.integer_dtypes(endianness="?")
    | npst.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | npst.complex_number_dtypes(endianness="?", sizes=(64, 128))
    | npst.datetime64_dtypes(endianness="?")
    | npst.timedelta64_dtypes(endianness="?")
    | npst.unicode_string_dtypes(endianness="?", max_len=5)
    | npst.byte_string_dtypes(max_len=5),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
leaves = scalars | tensors | arrays | st.binary(max_size=4).map(bytearray)


def containers(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mappings = st.dictionaries(any_text | keys, part, max_size=4)
    return (
        st.lists(part, max_size=4)
        | st.lists(part, max_size=4).map(tuple)
        | mappings
        | mappings.map(OrderedDict)
        | mappings.map(lambda found: defaultdict(list, found))
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
    )


@given(st.recursive(leaves, containers, max_leaves=12))
def test_any_tree_comes_back_exactly(tree: Any) -> None:
    assert same(round_trip(tree), tree)


@given(st.recursive(leaves, containers, max_leaves=8))
def test_equal_trees_give_equal_bytes(tree: Any) -> None:
    assert encode(round_trip(tree))[0] == encode(tree)[0]


@given(st.floats(), st.integers(0, 2**64 - 1))
def test_every_float_comes_back_to_the_bit(number: float, bits: int) -> None:
    any_float = struct.unpack(">d", bits.to_bytes(8, "big"))[0]
    for value in (number, any_float, -0.0, math.inf, -math.inf, math.nan, 5e-324):
        assert same(round_trip({"x": value})["x"], value)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_tensor_of_every_dtype_comes_back(name: str) -> None:
    dtype = DTYPES[name]
    content = torch.arange(48, dtype=torch.uint8).remainder(2 if dtype is torch.bool else 251)
    tensor = content.view(dtype)[: 48 // dtype.itemsize // 2 * 2].reshape(-1, 2)
    assert same(
        round_trip([tensor, tensor.t(), tensor[0, 0], tensor[:0]]), [tensor, tensor.t(), tensor[0, 0], tensor[:0]]
    )


@pytest.mark.parametrize(
    "value",
    [
        torch.Size([2, 3]),
        torch.Size([]),
        torch.bfloat16,
        torch.quint8,
        torch.device("cuda:3"),
        torch.device("cpu"),
        np.float64(math.nan),
        np.float32(-0.0),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1 + 2j),
        np.datetime64("2024-02-29"),
        np.datetime64("NaT"),
        np.timedelta64(5, "ms"),
        np.array("text"),
        np.array(["", ""]),
        np.zeros((2, 0, 3), dtype="<U0"),
        np.array([1, 2], dtype=">i4"),
        np.arange(6)[::-1],
        np.arange(12).reshape(3, 4)[:, ::2],
        np.broadcast_to(np.float32(1.5), (2, 2)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        2**63,
        -(2**63) - 1,
        {1: "int", "1": "str", True + 1: "two", None: 0, 1.5: 0, b"x": 0, (1, "a"): 0, frozenset({1}): 0},
        {"$tensor": "a user's own key"},
        {"": {"": {"": 1}}},
        "\ud800\udc00",
        {"\udfff": 1},
        defaultdict(None, {1: 2}),
        {1, 1.5, "a", None, (1, 2)},
        (),
        [],
        {},
    ],
)
def test_this_value_comes_back_with_its_type(value: Any) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip({"deep": [value]}), {"deep": [value]})


def test_bool_and_int_are_kept_apart() -> None:
    assert same(round_trip([True, 1, False, 0, 1.0]), [True, 1, False, 0, 1.0])


def test_keys_that_look_alike_name_different_items() -> None:
    one = torch.ones(1)
    tree = {
        "a/b": one,
        "a": {"b": one, "~1": one},
        "a~1b": one,
        0: one,
        "0": one,
        "~(0)": one,
        (0,): one,
        "": {"a": one},
    }
    assert same(round_trip(tree), tree)


def test_the_key_of_an_item_is_the_path_to_it() -> None:
    tree = {
        "model": [{"layers.0.weight": torch.zeros(1)}],
        "extra": {"a/b~c": (torch.zeros(2),), "n": {7: torch.zeros(3)}},
    }
    assert [key for key, _ in encode(tree)[1]] == ["model/0/layers.0.weight", "extra/a~1b~0c/0", "extra/n/~(7)"]


def test_tensors_are_listed_live_and_in_the_order_of_the_tree() -> None:
    weight, array = torch.zeros(2), np.zeros(2)
    _, listed = encode({"z": weight, "a": array})
    weight += 1
    array += 2
    assert [(key, tensor.tolist()) for key, tensor in listed] == [("z", [1.0, 1.0]), ("a", [2.0, 2.0])]


def test_parameters_and_leaves_come_back_as_such() -> None:
    tree = [
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.ones(2, requires_grad=True),
    ]
    assert same(round_trip(tree), tree)


def test_a_tensor_with_history_comes_back_without_it() -> None:
    loss = (torch.ones(2, requires_grad=True) * 3).sum()
    assert same(round_trip([loss]), [torch.tensor(6.0)])


def test_lazy_conjugates_and_negatives_come_back_as_their_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    lazy = [tensor.conj(), tensor.conj().imag, torch._neg_view(torch.ones(2))]
    assert same(
        round_trip(lazy), [part.clone() for part in (tensor.conj().resolve_conj(), -tensor.imag, -torch.ones(2))]
    )


def test_the_versions_of_a_modules_state_dict_come_back() -> None:
    saved = torch.nn.BatchNorm1d(2).state_dict()
    found = round_trip(saved)
    assert same(found, saved)
    assert found._metadata[""] == {"version": 2}


def test_a_value_that_hangs_twice_is_no_cycle() -> None:
    part = [1]
    assert round_trip({"a": part, "b": [part, part]}) == {"a": [1], "b": [[1], [1]]}


def test_nesting_up_to_the_bound_comes_back() -> None:
    assert same(round_trip(nested(MAX_DEPTH)), nested(MAX_DEPTH))
    pairs: Any = 0
    for _ in range(MAX_DEPTH):
        pairs = {1: pairs}
    assert same(round_trip(pairs), pairs)


# -- what is refused ------------------------------------------------------------------------------------------------


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    pass


Point = namedtuple("Point", "x y")


class Subclass(torch.Tensor):
    pass


def sparse_rows() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta state
        return torch.eye(2).to_sparse_csr()


def nested_tensor(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as is this one
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=layout)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "object"),
        (print, "builtin_function_or_method"),
        (lambda: 0, "function"),
        (int, "type"),
        (Color.RED, "Color"),
        (Text("a"), "Text"),
        (Point(1, 2), "Point"),
        (Counter("ab"), "Counter"),
        (deque([1]), "deque"),
        (range(3), "range"),
        (defaultdict(lambda: 0), "defaultdict with the factory"),
        (np.array([object()]), "numpy array of object"),
        (np.zeros(1, dtype=[("a", "i4")]), "numpy array of"),
        (np.longdouble(1), "numpy scalar"),
        (np.str_("a"), "numpy scalar"),
        (np.ma.masked_array([1]), "MaskedArray"),
        ({Color.RED: 1}, "Color"),
        ({(1, Color.RED): 1}, "Color"),
        ({torch.ones(1): 1}, "Tensor"),
        ({np.int64(1)}, "int64"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (sparse_rows(), "sparse_csr"),
        (nested_tensor(torch.strided), "nested"),
        (nested_tensor(torch.jagged), "NestedTensor"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).as_subclass(Subclass), "Subclass"),
        (torch.empty(2, dtype=torch.uint4), "uint4"),
        (torch.nn.UninitializedParameter(), "UninitializedParameter"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_this_is_refused_by_name_and_path_with_advice(value: Any, named: str) -> None:
    with pytest.raises(UnsupportedStateError) as refused:
        encode({"extra": {"mine": [0, {"it": value}]}})
    assert "extra/mine/1/it" in str(refused.value)
    assert named in str(refused.value)
    assert "leave it out" in refused.value.advice


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_tensor_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="x is a quantized tensor"):
        encode({"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})


def test_a_cycle_is_refused_where_it_closes() -> None:
    tree: dict[str, Any] = {"a": [{}]}
    tree["a"][0]["back"] = tree["a"]
    with pytest.raises(UnsupportedStateError, match="a/0/back contains itself"):
        encode(tree)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
def test_nesting_beyond_the_bound_is_refused(depth: int) -> None:
    with pytest.raises(UnsupportedStateError, match="deep"):
        encode(nested(depth))


# -- bytes that nobody wrote ----------------------------------------------------------------------------------------


def read(values: bytes) -> Any:
    return decode(values, lambda key: torch.zeros(2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nan",
        "NaN",
        "Infinity",
        "1e999",
        "9" * 5000,
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        '{"$tuple":' * 400 + "[]" + "}" * 400,
        '{"a":1,"a":2}',
        '{"$unknown":[]}',
        '{"$tuple":1}',
        '{"$tuple":[],"more":1}',
        '{"$dict":[[1]]}',
        '{"$dict":[[[1],2]]}',
        '{"$dict":[[1,2],[1,3]]}',
        '{"$dict":[[{"$tensor":"a","dtype":"float32"},2]]}',
        '{"$set":[{"$dict":[]}]}',
        '{"$default_dict":[],"factory":"eval"}',
        '{"$default_dict":[]}',
        '{"$int":"zz"}',
        '{"$int":1}',
        '{"$float":"00"}',
        '{"$float":"zz"}',
        '{"$complex":"00"}',
        '{"$bytes":"é"}',
        '{"$bytes":"a"}',
        '{"$str":"//8="}',
        '{"$size":["a"]}',
        '{"$size":[99999999999999999999]}',
        '{"$dtype":"load"}',
        '{"$device":"nowhere:0"}',
        '{"$tensor":"a"}',
        '{"$tensor":1,"dtype":"float32"}',
        '{"$tensor":"a","dtype":"int4"}',
        '{"$tensor":"a","dtype":"float64"}',
        '{"$tensor":"a","dtype":"float32","device":"../x"}',
        '{"$tensor":"a","dtype":"float32","placements":[1]}',
        '{"$tensor":"a","dtype":"float32","what":1}',
        '{"$array":"a","dtype":"<f4","shape":[3]}',
        '{"$array":"a","dtype":"<f4","shape":[-2]}',
        '{"$array":"a","dtype":"|O8","shape":[2]}',
        '{"$array":"a","dtype":"<f3","shape":[2]}',
        '{"$array":"a","dtype":"<f4,<f4","shape":[2]}',
        '{"$array":"a","shape":[2]}',
        '{"$scalar":"00","dtype":"<f4"}',
        '{"$scalar":"zz","dtype":"<f4"}',
        '{"$scalar":"00","dtype":"|S1"}',
    ],
    ids=lambda text: text[:40],
)
def test_bytes_that_nobody_wrote_are_a_corrupt_copy(text: str) -> None:
    with pytest.raises(CorruptCopyError):
        read(text.encode())


def test_a_reference_to_a_tensor_that_is_not_there_is_a_corrupt_copy() -> None:
    values, _ = encode({"a": torch.ones(2)})
    with pytest.raises(CorruptCopyError, match="refer to a, which the save does not hold"):
        decode(values, {}.__getitem__)


def refused_or_sound(decoding: Callable[[], Any]) -> bool:
    """What came out of bytes that nobody wrote is a tree like any other: it is stored and comes back the same."""
    try:
        tree = decoding()
    except CorruptCopyError:
        return True
    return encode(round_trip(tree))[0] == encode(tree)[0]


@given(st.recursive(leaves, containers, max_leaves=6), st.data())
def test_damaged_bytes_decode_or_are_a_corrupt_copy(tree: Any, data: st.DataObject) -> None:
    values, found = encode(tree)
    damaged = bytearray(values)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert refused_or_sound(lambda: decode(bytes(damaged), dict(found).__getitem__))


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "$tuple",
                    "$dict",
                    "$ordered_dict",
                    "$default_dict",
                    "$set",
                    "$frozenset",
                    "$tensor",
                    "$array",
                    "$scalar",
                    "$int",
                    "$float",
                    "$str",
                    "$bytes",
                    "$complex",
                    "$bytearray",
                    "$size",
                    "$dtype",
                    "$device",
                    "dtype",
                    "shape",
                    "factory",
                    "metadata",
                    "placements",
                    "device",
                    "a",
                ]
            ),
            part | st.sampled_from(["float32", "<f4", "list", "cuda", "ff", "<M8[ns]", "<U9"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(json_trees)
def test_any_json_decodes_or_is_a_corrupt_copy(tree: Any) -> None:
    assert refused_or_sound(lambda: read(json.dumps(tree).encode()))


def test_padding_after_the_values_is_ignored() -> None:
    assert read(b'{"a":[1]}   \n ') == {"a": [1]}


def test_what_is_written_is_this() -> None:
    tree = {"a": (1, -0.0, math.inf), "w": torch.zeros(1, dtype=torch.bfloat16), "k": {2: b"\0"}}
    assert encode(tree)[0] == (
        b'{"a":{"$tuple":[1,-0.0,{"$float":"7ff0000000000000"}]},"w":{"$tensor":"w","dtype":"bfloat16"},'
        b'"k":{"$dict":[[2,{"$bytes":"AA=="}]]}}'
    )


def test_arrays_share_no_memory_with_anybody_who_may_not_write() -> None:
    found = round_trip({"a": np.arange(3), "b": np.array(["x"])})
    found["a"][0] = 9
    found["b"][0] = "y"
    assert found["a"].tolist() == [9, 1, 2]


def test_bytes_of_a_tensor_are_those_in_c_order() -> None:
    assert byte_view(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8).t()).tolist() == [1, 3, 2, 4]
