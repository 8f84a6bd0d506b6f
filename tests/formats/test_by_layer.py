"""Layers stored as one tensor are read as many, and many as one: the same elements under either name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from resilience import load_checkpoint
from resilience.errors import LayoutMismatchError, MissingKeysError
from resilience.formats.by_layer import LayeredReader
from resilience.formats.protocol import RankShare, StoredTensor, Target
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.formats.stacks import Stacks, under_stored_keys
from resilience.state.megatron_model import unique_name
from resilience.state.stored_place import StackPlace, StoredPlace, StoredPlaces
from resilience.stores.filesystem import PosixFileSystem
from resilience.testing.ranks import ThreadAgreements, on_all_ranks
from tests.formats.jobs import Job
from tests.formats.worlds import meta, save, whole

FS = PosixFileSystem()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Memory:
    """A checkpoint that is a dictionary."""

    folder = Path("nowhere")
    record, aliases, common, objects = None, {}, {}, ()

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.index = {path: StoredTensor(t.dtype, tuple(t.shape)) for path, t in tensors.items()}

    def read(self, targets: list[Target]) -> None:
        for target in targets:
            assert target.out.dim() == self.tensors[target.key].dim()
            region = tuple(slice(at, at + n) for at, n in zip(target.offsets, target.out.shape, strict=True))
            target.out.copy_(self.tensors[target.key][region])


def read(reader: LayeredReader, path: str, region: tuple[slice, ...] | None = None) -> torch.Tensor:
    shape = reader.index[path].global_shape
    region = region or tuple(slice(0, length) for length in shape)
    out = torch.full([part.stop - part.start for part in region], -1.0)
    reader.read([Target(path, out, tuple(part.start for part in region), shape)])
    return out


@st.composite
def regions(draw: Any, shape: tuple[int, ...]) -> tuple[slice, ...]:
    found = []
    for length in shape:
        start = draw(st.integers(0, length - 1))
        found.append(slice(start, draw(st.integers(start + 1, length))))
    return tuple(found)


STACK = torch.arange(3 * 4 * 5.0).reshape(3, 4, 5)
PREFIXES = ["model/0/decoder.layers", "model/1/layers", "optimizer/0/state/a.layers"]


@given(data=st.data(), prefix=st.sampled_from(PREFIXES))
def test_any_region_of_one_of_a_stack_is_that_of_the_stack(data: st.DataObject, prefix: str) -> None:
    moment = "/exp_avg" if prefix.startswith("optimizer") else ""
    wanted = [f"{prefix}.{layer}.mlp.w" for layer in range(4)]
    reader = LayeredReader(Memory({f"{prefix}.mlp.w{moment}": STACK}), {}, wanted)  # type: ignore[arg-type]
    assert wanted[3] + moment not in reader.index, "there are three layers"
    layer, region = data.draw(st.integers(0, 2)), data.draw(regions((4, 5)))
    assert torch.equal(read(reader, wanted[layer] + moment, region), STACK[layer][region])


@given(data=st.data(), prefix=st.sampled_from(PREFIXES))
def test_any_region_of_many_as_one_is_that_of_each(data: st.DataObject, prefix: str) -> None:
    moment = "/exp_avg" if prefix.startswith("optimizer") else ""
    stored = {f"{prefix}.{layer}.mlp.w{moment}": STACK[layer] for layer in range(3)}
    reader = LayeredReader(Memory(stored), {}, [f"{prefix}.mlp.w"])  # type: ignore[arg-type]
    region = data.draw(regions((3, 4, 5)))
    assert torch.equal(read(reader, f"{prefix}.mlp.w{moment}", region), STACK[region])


@given(data=st.data())
def test_any_region_of_two_halves_is_that_of_both_together(data: st.DataObject) -> None:
    halves = {"model/0/fc1.weight_w": STACK[0], "model/0/fc1.weight_v": STACK[1]}
    reader = LayeredReader(Memory(halves), {}, ["model/0/fc1.weight"])  # type: ignore[arg-type]
    region = data.draw(regions((8, 5)))
    assert torch.equal(read(reader, "model/0/fc1.weight", region), torch.cat([STACK[0], STACK[1]])[region])


def test_what_the_model_says_of_its_keys_is_believed_before_any_rule() -> None:
    """Megatron's norms stand under another name, and experts have two axes before their own."""
    experts = torch.arange(3 * 2 * 4.0).reshape(3, 2, 4)
    places = {
        "model/0/decoder.layers.1.norm": StoredPlace("model/0/decoder.layers.qkv.norm", (1,), (3,)),
        "model/0/layers.2.e.experts.1.w": StoredPlace("model/0/layers.e.experts.w", (2, 1), (3, 2)),
    }
    stored = {"model/0/decoder.layers.qkv.norm": STACK[0][:3], "model/0/layers.e.experts.w": experts}
    reader = LayeredReader(Memory(stored), places, places)  # type: ignore[arg-type]
    assert torch.equal(read(reader, "model/0/decoder.layers.1.norm"), STACK[0][1])
    assert torch.equal(read(reader, "model/0/layers.2.e.experts.1.w"), experts[2, 1])


def test_another_number_of_layers_is_refused_in_words() -> None:
    places = {"model/0/layers.1.w": StoredPlace("model/0/layers.w", (1,), (2,))}
    with pytest.raises(LayoutMismatchError, match=r"\[3\] along its first axes.*here it is \[2\]"):
        LayeredReader(Memory({"model/0/layers.w": STACK}), places, places)  # type: ignore[arg-type]


def test_another_shape_of_one_layer_is_refused() -> None:
    reader = LayeredReader(Memory({"model/0/layers.w": STACK}), {}, ["model/0/layers.0.w"])  # type: ignore[arg-type]
    with pytest.raises(LayoutMismatchError, match=r"\(4, 5\).*\(4, 6\)"):
        reader.read([Target("model/0/layers.0.w", torch.empty(4, 6), (0, 0), (4, 6))])


@given(asked=st.sets(st.integers(0, 2)))
def test_of_a_stack_the_layers_that_nobody_asks_for_are_told_apart(asked: set[int]) -> None:
    names = [f"model/0/layers.{layer}.w" for layer in range(3)]
    stored = {"model/0/layers.w": STACK, "model/0/b": STACK}
    here = LayeredReader(Memory(stored), {}, [names[layer] for layer in asked])  # type: ignore[arg-type]
    elsewhere = LayeredReader(Memory(stored), {}, ())  # type: ignore[arg-type]
    assert here.units() == elsewhere.units(), "ranks compare them by position"
    left = set(here.units()) - here.units_asked({names[layer] for layer in asked} | {"model/0/b"})
    told = {f"model/0/layers.w[{layer}]" for layer in {0, 1, 2} - asked}
    assert here.paths_of(left) == (told if asked else {"model/0/layers.w"})


# -- whole checkpoints ------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(4, 5))


class PerLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block(), Block()])


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Module()
        self.layers.w = torch.nn.Parameter(torch.zeros(3, 4, 5))


class Squared(Job):
    def train(self) -> None:
        sum((each**2).sum() for each in self.model.parameters()).backward()  # type: ignore[union-attr]
        self.opt.step()


def stacked_folder(folder: Path) -> Path:
    """As another program has it."""
    dcp.save({"layers.w": STACK}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 7}, folder / "common.pt")
    return folder


def test_a_model_of_single_layers_takes_a_checkpoint_of_stacked_ones_and_the_other_way_round(tmp_path: Path) -> None:
    model = PerLayer()
    load_checkpoint(stacked_folder(tmp_path / "iter_0000007"), model)
    assert torch.equal(torch.stack([layer.w for layer in model.layers]), STACK)  # type: ignore[union-attr]

    single = Squared(tmp_path, make=PerLayer).run(8)
    assert torch.equal(single.loaded["layers.2.w"], STACK[2])
    many = Job(tmp_path, make=Stack, options={"load_optim": False, "load_rng": False}).run()
    assert torch.equal(many.loaded["layers.w"], torch.stack([layer.w for layer in single.model.layers]))  # type: ignore[attr-defined]


def test_layers_that_are_not_there_are_named_and_those_left_behind_too(tmp_path: Path) -> None:
    folder = stacked_folder(tmp_path / "iter_0000007")
    model = PerLayer()
    del model.layers[2]
    with pytest.raises(MissingKeysError, match=r"not asked for \(missing\): layers\.w\[2\]"):
        load_checkpoint(folder, model, strictness="raise_all")
    model.layers.extend([Block(), Block()])
    with pytest.raises(MissingKeysError, match=r"\(unexpected\): layers\.3\.w"):
        load_checkpoint(folder, model)


# -- under which keys they are written --------------------------------------------------------------------------------


def test_layers_of_several_ranks_and_their_moments_become_one_tensor_each(tmp_path: Path) -> None:
    """Each of two pipeline stages has one layer; the second name of shared memory is a layer of its own there."""
    layers = [StackPlace("layers.w", (number,), (3,)) for number in range(3)]

    def chunks(rank: int) -> Any:
        here = {0: [0], 1: [1]}[rank]
        models = {f"model/0/layers.{number}.w": (layers[number], (4, 5)) for number in (*here, *([2] * rank))}
        prefixes = [(f"optimizer/0/state/layers.{number}.w", f"model/0/layers.{number}.w") for number in range(3)]
        own = [whole(f"model/0/layers.{number}.w", STACK[number]) for number in here]
        own += [whole(f"optimizer/0/state/layers.{number}.w/exp_avg", -STACK[number]) for number in here]
        aliases = {"model/0/layers.2.w": "model/0/layers.1.w"} if rank else {}
        found, left = under_stored_keys(own, aliases, StoredPlaces(models, prefixes))
        assert not left
        return found

    save(tmp_path / "whole", lambda rank: [c for c in chunks(rank) if c.key.startswith("model/")], world_size=2)
    reader = open_checkpoint(tmp_path / "whole", FS)
    assert set(reader.index) == {"model/0/layers.w"}
    out = torch.empty(3, 4, 5)
    reader.read([Target("model/0/layers.w", out, (0, 0, 0))])
    assert torch.equal(out, torch.stack([STACK[0], STACK[1], STACK[1]]))


def test_optimizers_of_a_model_with_keys_of_its_own_have_theirs_in_common_unless_they_train_the_same() -> None:
    """As Megatron Core has it, of whose optimizers one trains the experts."""
    models = {
        "model/0/layers.1.w": (StackPlace("layers.w", (1,), (2,)), (4, 5)),
        "model/0/layers.1.e": (StackPlace("layers.e", (1,), (2,)), (4, 5)),
        "model/0/head": (StackPlace("out", (), ()), (4, 5)),
    }
    prefixes = [("optimizer/0/state/layers.1.w", "model/0/layers.1.w"), ("optimizer/0/state/head", "model/0/head")]
    prefixes += [("optimizer/1/state/layers.1.e", "model/0/layers.1.e"), ("optimizer/1/state/head", "model/0/head")]
    places = StoredPlaces(models, prefixes)

    def at(path: str, shape: tuple[int, ...] = (4, 5)) -> str | None:
        place = places.of(path, shape)
        return place and place.path

    assert at("optimizer/0/state/layers.1.w/exp_avg") == "optimizer/0/state/layers.w/exp_avg"
    assert at("optimizer/1/state/layers.1.e/exp_avg") == "optimizer/0/state/layers.e/exp_avg"
    assert at("optimizer/0/state/head/exp_avg") == "optimizer/0/state/out/exp_avg"
    assert at("optimizer/1/state/head/exp_avg") == "optimizer/1/state/out/exp_avg", "trained by both"
    assert at("optimizer/1/state/layers.1.e/step", ()) is None
    head = whole("model/0/head", STACK[0])
    found, left = under_stored_keys([head], {"optimizer/0/state/head/param": "model/0/head"}, places)
    assert [chunk.key for chunk in found] == ["model/0/out"]
    assert left == {"optimizer/0/state/out/param": "model/0/out"}


def test_where_a_layer_has_no_moments_each_is_stored_by_itself_and_when_it_has_they_are_one_again(
    tmp_path: Path,
) -> None:
    """A frozen layer, an expert that got no token: a stack with a gap would be refused, and the save with it."""
    models = {f"model/0/layers.{number}.w": (StackPlace("layers.w", (number,), (2,)), (4, 5)) for number in range(2)}
    places = StoredPlaces(models, [(path.replace("model/0", "optimizer/0/state"), path) for path in models])
    rounds: list[set[str]] = []

    def write(agreements: ThreadAgreements) -> None:
        stacks, rank = Stacks(), agreements.rank
        for number, trained in enumerate([{0}, {0, 1}, {0, 1}]):
            own = [whole(f"model/0/layers.{rank}.w", STACK[rank])]
            own += [whole(f"optimizer/0/state/layers.{rank}.w/exp_avg", -STACK[rank])] if rank in trained else []
            share = stacks.store(RankShare(own, b"{}"), places, agreements, "here")  # type: ignore[arg-type]
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            checkpoint_format("torch_dist").save(folder, share, meta(7, 2), agreements, FS)  # type: ignore[arg-type]
            agreements.barrier()
            if rank == 0:
                rounds.append(set(open_checkpoint(folder, FS).index))

    for outcome in on_all_ranks(2, write):
        assert outcome is None, outcome
    model, moments = {"model/0/layers.w"}, "optimizer/0/state/layers{}.w/exp_avg"
    assert rounds == [model | {moments.format(".0")}, model | {moments.format("")}, model | {moments.format("")}]
    alone = LayeredReader(open_checkpoint(tmp_path / "0", FS), places.bases, places.bases)
    assert torch.equal(read(alone, moments.format(".0")), -STACK[0])
    assert moments.format(".1") not in alone.index
    together = LayeredReader(open_checkpoint(tmp_path / "2", FS), places.bases, places.bases)
    assert torch.equal(read(together, moments.format(".1")), -STACK[1])


@pytest.mark.parametrize(
    ("key", "index", "name"),
    [
        ("decoder.layers.mlp.linear_fc2.weight", (7,), "decoder.layers.7.mlp.linear_fc2.weight"),
        ("decoder.layers.mlp.experts.experts.w", (3, 5), "decoder.layers.3.mlp.experts.experts.5.w"),
        ("embedding.word_embeddings.weight", (), "embedding.word_embeddings.weight"),
        ("decoder.layers.3.mlp.w", (), "decoder.layers.3.mlp.w"),
        ("blocks.w", (2,), "blocks.w.2"),
    ],
)
def test_a_name_is_good_for_the_whole_model(key: str, index: tuple[int, ...], name: str) -> None:
    assert unique_name(key, index) == name
