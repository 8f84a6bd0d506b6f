"""The real Megatron Core on a CPU, as a program: its own checkpoints, and our trainer around its model.

    python megatron_program.py save   FOLDER --tp=2 --world=4    Megatron Core saves a GPT with known values
    python megatron_program.py load   FOLDER --pp=2 --world=2    Megatron Core loads one and checks every value
    python megatron_program.py train  ROOT   --tp=2 --world=4    our trainer trains and saves it
    python megatron_program.py resume ROOT   --pp=2 --world=2    our trainer goes on from either, and checks every value
    python megatron_program.py evaluate ROOT                     `load_checkpoint` into the model

Run by an interpreter that has Megatron Core. Whole sharded state dicts go both ways: tensors, both parts of gated
projections, objects (extra state, random state), and the optimizer's moments beside them. Prints one JSON document: key
→ global shape of every tensor (nothing for an object) that was saved, or that was loaded and found right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from tests.interop.megatron_gpt import (  # noqa: E402
    MOMENTS,
    Layout,
    expected,
    fill,
    gpt,
    join,
    keep_extra_state,
    parts_of,
    stand_in_for_triton,
    whole,
)

Told = dict[str, list[int] | None]
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=sorted(_WORK))
    parser.add_argument("path", type=Path)
    for name in ("tp", "pp", "world", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0)
    for name in ("gated", "tied"):
        parser.add_argument(f"--{name}", action="store_true")
    options = vars(parser.parse_args())
    what, path = options.pop("what"), options.pop("path")
    layout = Layout(**options)
    with tempfile.TemporaryDirectory() as meeting:
        stand_in_for_triton()
        import megatron.core.models.gpt.gpt_model  # noqa: F401  (once, before the ranks are forked)

        import resilience.trainer  # noqa: F401

        mp.start_processes(_rank, args=(what, path, layout, meeting), nprocs=layout.world, start_method="fork")
        print((Path(meeting) / "told.json").read_text())


def _rank(rank: int, what: str, path: Path, layout: Layout, meeting: str) -> None:
    join(rank, layout, meeting)
    keep_extra_state()
    told = _WORK[what](path, layout)
    parts: list[Any] = [None] * layout.world
    dist.all_gather_object(parts, told)
    if rank == 0:
        content = {key: shape for part in parts for key, shape in part.items()}
        (Path(meeting) / "told.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


# -- Megatron Core's own way ------------------------------------------------------------------------------------------


def _sharded(model: Any) -> dict[str, Any]:
    """The model's whole sharded state dict, the optimizer's moments, and the random state as Megatron Bridge has it."""
    from megatron.core import parallel_state as places
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    described = model.sharded_state_dict()
    entries = dict(described)
    for name, each in described.items():
        if not parts_of(each):
            continue
        for moment in MOMENTS:
            state = torch.zeros(each.data.shape, dtype=torch.float32)
            entries[f"{moment}.{name}"] = make_sharded_optimizer_tensor(each, state, f"optimizer.state.{moment}")
    grid = (places.get_pipeline_model_parallel_world_size(), places.get_tensor_model_parallel_world_size())
    place = (places.get_pipeline_model_parallel_rank(), places.get_tensor_model_parallel_rank())
    if places.get_expert_model_parallel_world_size() > 1:
        grid = (*grid, places.get_data_parallel_world_size(with_context_parallel=True))
        place = (*place, places.get_data_parallel_rank(with_context_parallel=True))
        entries["rng_state"] = ShardedObject("rng_state", [_random_states()], grid, place, replica_id=0)
    else:
        replica = places.get_data_parallel_rank(with_context_parallel=True)
        entries["rng_state"] = ShardedObject("rng_state", [_random_states()], grid, place, replica_id=replica)
    return entries


def _save(folder: Path, layout: Layout) -> Told:
    from megatron.core import dist_checkpointing

    model = gpt(layout)
    fill(model)
    _seed()
    entries = _sharded(model)
    for each in entries.values():
        for part in parts_of(each):
            part.data.detach().copy_(expected(part, part.key, part.data.dtype))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    told = _told(entries)  # before the save puts parts in the place of those that make them
    content = {"distrib_optim_sharding_type": "fully_reshardable"}
    dist_checkpointing.save(
        {"entries": entries, "iteration": STEPS, "checkpoint_version": 3.0, "content_metadata": content}, str(folder)
    )
    return told


def _load(folder: Path, layout: Layout) -> Told:
    from megatron.core import dist_checkpointing

    model = gpt(layout)
    entries = _sharded(model)
    same_place = _has_key(folder, entries["rng_state"].unique_key)
    if not same_place:  # the grid of random states cannot be cut anew: Megatron's programs skip it too
        del entries["rng_state"]
    wanted = {name: parts_of(each) for name, each in entries.items()}
    told = _told(entries)
    # as strict as it can be asked to be: whatever it asks for has to be there
    loaded = dist_checkpointing.load({"entries": entries}, str(folder), strict="raise_unexpected")["entries"]
    for name, parts in wanted.items():
        if parts:
            value = torch.cat([expected(part, part.key, part.data.dtype) for part in parts])
            if not torch.equal(loaded[name].reshape(value.shape), value):
                raise AssertionError(f"{name} ({parts[0].key}) differs")
        elif name != "rng_state":
            _check_extra_state(name, loaded[name], told)
    if same_place:
        _check_random_states(loaded["rng_state"][0])
    return told


def _has_key(folder: Path, key: str) -> bool:
    from torch.distributed.checkpoint import FileSystemReader

    return key in FileSystemReader(folder).read_metadata().state_dict_metadata


# -- our trainer around its model -------------------------------------------------------------------------------------


def _trainer(model: Any, optimizer: Any, layout: Layout, **checkpoint: Any) -> Any:
    from megatron.core import parallel_state as places

    from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig, ResilientTrainer

    root = Path(checkpoint.get("save") or checkpoint["load"])
    beside = str(root.with_name(f"{root.name}.memory"))
    return ResilientTrainer(
        model, optimizer,
        layout=ParallelLayout(
            tp=layout.tp, pp=layout.pp, ep=layout.ep, tp_rank=places.get_tensor_model_parallel_rank(),
            pp_rank=places.get_pipeline_model_parallel_rank(), ep_rank=places.get_expert_model_parallel_rank(),
        ),
        checkpoint=CheckpointConfig(**checkpoint),
        resiliency=ResiliencyConfig(run_id=f"interop{root.name}", memory_dir=beside),
    )  # fmt: skip


def _train(root: Path, layout: Layout) -> Told:
    """A user's loop; what it trained is replaced by known values before the last boundary."""
    model = gpt(layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with _trainer(model, optimizer, layout, save=str(root)) as trainer:
        assert trainer.resumed_from is None
        for _ in trainer.iterations(STEPS):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.25)
            optimizer.step()
            fill(model)
            for part in _moments(model, optimizer):
                part.data.copy_(expected(part, part.key, torch.float32))
            _seed()
    return _told(model.sharded_state_dict())


def _resume(root: Path, layout: Layout) -> Told:
    """Go on from the newest checkpoint, at whatever layout it was saved under; check all of it, and save again."""
    model = gpt(layout)
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    _seed("a fresh start, with other numbers")
    ours = (root / f"iter_{STEPS:07d}" / "resilience.json").exists()
    same_place = _has_key(root / f"iter_{STEPS:07d}", _sharded(model)["rng_state"].unique_key)
    with _trainer(model, optimizer, layout, load=str(root), dist_ckpt_strictness="raise_unexpected") as trainer:
        assert trainer.iteration == STEPS, trainer.iteration
        random_states = _random_states()
    told = _check_model(model)
    for part in _moments(model, optimizer) if ours else ():
        if not torch.equal(part.data, expected(part, part.key, torch.float32)):
            raise AssertionError(f"{part.key} differs")
    if same_place:
        _check_random_states(random_states)
    return told


def _evaluate(root: Path, layout: Layout) -> Told:
    from resilience import load_checkpoint

    model = gpt(layout)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_checkpoint(root, model)
    return _check_model(model, objects=False)


def _moments(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Where the optimizer's state lies in the whole; its tensors are live."""
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    named = dict(model.named_parameters())
    for name, described in model.sharded_state_dict().items():
        for moment in MOMENTS if name in named else ():
            state = optimizer.state[named[name]][moment]
            yield from parts_of(make_sharded_optimizer_tensor(described, state, f"optimizer.state.{moment}"))


def _check_model(model: Any, *, objects: bool = True) -> Told:
    entries = model.sharded_state_dict()
    told = _told(entries)
    for name, described in entries.items():
        for part in parts_of(described):
            if not torch.equal(part.data, expected(part, part.key, part.data.dtype)):
                raise AssertionError(f"{name} ({part.key}) differs")
        if objects and not parts_of(described):
            _check_extra_state(name, described.data, told)
    return told


# -- objects ----------------------------------------------------------------------------------------------------------


def _check_extra_state(name: str, found: Any, told: Told) -> None:
    """Linear projections keep bytes that follow from the object's key, as Transformer Engine's would; others None."""
    keys = [key for key in told if "linear_proj._extra_state" in key]
    if not name.endswith("linear_proj._extra_state"):
        assert found is None, (name, found)
    elif not any(isinstance(found, torch.Tensor) and torch.equal(found, whole(key, (5,), found.dtype)) for key in keys):
        raise AssertionError(f"{name} differs: {found}")


def _seed(start: str = "") -> int:
    """Alike over data parallelism, as Megatron seeds."""
    from megatron.core import parallel_state as places
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    place = (places.get_pipeline_model_parallel_rank(), places.get_tensor_model_parallel_rank())
    seed = zlib.crc32(f"{place}{start}".encode())
    random.seed(seed)
    torch.manual_seed(seed)
    get_cuda_rng_tracker().set_states({"model-parallel-rng": torch.Generator().manual_seed(seed + 1).get_state()})
    return seed


def _random_states() -> dict[str, Any]:
    """As Megatron Bridge's `get_rng_state` has them, without a GPU's."""
    import numpy as np
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def _check_random_states(found: dict[str, Any]) -> None:
    seed = _seed()
    wanted = _random_states()
    assert found["random_rng_state"] == wanted["random_rng_state"], "random"
    assert torch.equal(found["torch_rng_state"], wanted["torch_rng_state"]), "torch"
    assert found["np_rng_state"][0] == "MT19937"
    tracker = torch.Generator().manual_seed(seed + 1).get_state()
    assert torch.equal(found["rng_tracker_states"]["model-parallel-rng"], tracker), "tracker"


def _told(entries: dict[str, Any]) -> Told:
    told: Told = {}
    for each in entries.values():
        parts = parts_of(each)
        told |= {part.key: list(part.global_shape) for part in parts} if parts else {each.unique_key: None}
    return told


_WORK = {"save": _save, "load": _load, "train": _train, "resume": _resume, "evaluate": _evaluate}

if __name__ == "__main__":
    main()
