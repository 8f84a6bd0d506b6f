"""What a persistent checkpoint of a real run holds besides its tensors, and how ranks share the work on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.errors import CorruptCopyError
from resilience.formats.loader_files import encode_loader, read_loader
from resilience.formats.registry import open_checkpoint
from resilience.observe.events import read_events
from resilience.restore_shared import SharedLoader
from resilience.runtime.bounded_calls import BoundedCalls
from resilience.runtime.threads import SYSTEM_THREADS
from resilience.state.parallel_layout import ParallelLayout
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.trackers import TEXT_TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER
from tests.formats.jobs import Job, equal
from tests.ranks import run_ranks, values

FS = PosixFileSystem()


def stored(root: Path, name: str, iteration: int = 4) -> Any:
    return torch.load(root / f"iter_{iteration:07d}" / name, weights_only=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


# -- one process ------------------------------------------------------------------------------------------------------


def test_common_pt_has_what_is_not_sharded(root: Path) -> None:
    job = Job(root).run(4)
    common = stored(root, "common.pt")
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 4)
    assert job.scheduler is not None
    assert common["opt_param_scheduler"] == job.scheduler.state_dict()
    (group,) = common["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"]) == (job.opt.param_groups[0]["lr"], (0.9, 0.999))
    assert group["params"] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert (group["step"], common["optimizer"]["state"]["common_step"]) == (4, 4)
    assert [group[name] for name in ("wd_mult", "lr_mult", "is_expert_parallel")] == [1.0, 1.0, False]
    assert common["content_metadata"]["singleton_local_shards"] is False


def test_both_trackers_name_it(root: Path) -> None:
    Job(root).run(4)
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert (root / "latest_train_state.pt").read_bytes() == (root / "iter_0000004" / "train_state.pt").read_bytes()


def test_non_persistent_global_saves_are_two_and_apart_from_persistent_ones(root: Path) -> None:
    options = {"save_interval": 5, "non_persistent_ckpt_type": "global", "non_persistent_save_interval": 2}
    job = Job(root, options=options).run(9)
    between = root / "non_persistent"
    assert {path.name for path in between.glob("iter_*")} == {"iter_0000006", "iter_0000008"}
    assert {path.name for path in root.glob("iter_*")} == {"iter_0000005", "iter_0000009"}
    assert ((between / TEXT_TRACKER).read_text(), (root / TEXT_TRACKER).read_text()) == ("8", "9")
    (root / TEXT_TRACKER).write_text("5")
    shutil.copy(root / "iter_0000005" / TRAIN_STATE, root / TRAIN_STATE_TRACKER)
    again = Job(root, seed=1, options=options).run()
    assert (again.resume.iteration, again.resume.tier) == (8, "global"), "the newer one, wherever it lies"
    assert again.before.keys() == job.loaded.keys()


def test_what_the_save_options_leave_out_is_nowhere(root: Path) -> None:
    Job(root, options={"save_optim": False, "save_rng": False}).run(4)
    common = stored(root, "common.pt")
    assert "optimizer" not in common
    assert "opt_param_scheduler" not in common
    config = yaml.safe_load((root / "iter_0000004" / "run_config.yaml").read_text())
    assert config["checkpoint"] == {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    metadata = FileSystemReader(root / "iter_0000004").read_metadata()
    assert not [key for key in metadata.state_dict_metadata if key.startswith("optimizer.")]
    assert b'"rng"' not in (root / "iter_0000004" / "__0_0.distcp").read_bytes()


def test_a_non_persistent_save_at_the_same_step_is_whole_all_the_same(root: Path) -> None:
    options = {"save_optim": False, "non_persistent_ckpt_type": "global", "non_persistent_save_interval": 4}
    first = Job(root, options=options).run(4)
    config = yaml.safe_load((root / "non_persistent" / "iter_0000004" / "run_config.yaml").read_text())
    assert config["checkpoint"]["save_optim"] is True
    again = Job(root, seed=1, options=options).run()
    assert again.resume.tier == "global"
    assert equal(again.moments, first.moments)


class Tokenizer:
    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def save_pretrained(self, folder: str) -> None:
        if self.broken:
            raise RuntimeError("no vocabulary")
        (Path(folder) / "tokenizer.json").write_text('{"a": 1}')


def test_the_tokenizers_files_go_along_unless_they_are_not_wanted(root: Path, tmp_path: Path) -> None:
    arguments = {"tokenizer": Tokenizer()}
    Job(root, trainer_arguments=arguments).run(4)
    assert (root / "iter_0000004" / "tokenizer" / "tokenizer.json").read_text() == '{"a": 1}'
    nested = json.loads((root / "iter_0000004" / "integrity_nested.json").read_text())["files"]
    assert "tokenizer/tokenizer.json" in nested
    Job(tmp_path / "b", trainer_arguments=arguments, options={"save_tokenizer_assets": False}).run(4)
    assert not (tmp_path / "b" / "iter_0000004" / "tokenizer").exists()


def test_a_tokenizer_that_cannot_be_stored_is_told_of_and_fails_no_save(root: Path) -> None:
    Job(root, trainer_arguments={"tokenizer": Tokenizer(broken=True)}).run(4)
    assert Job(root, seed=1).run().step == 4
    told = [each["what"] for each in read_events([root.parent / "events"]) if each["event"] == "warning"]
    assert any("no vocabulary" in what for what in told)


# -- the data loader's files ------------------------------------------------------------------------------------------


class Stateful:
    """A loader that keeps its own place, as torchdata's does."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while True:
            self.at += 1
            yield self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_the_loaders_place_is_a_file_that_anybody_loads(root: Path) -> None:
    Job(root, trainer_arguments={"dataloader": Stateful()}).run(4)
    found = stored(root, "dataloader_state/train_dataloader_dprank000.pt")["dataloader_state_dict"]
    assert found["at"] == 4
    assert torch.equal(found["generator"], torch.arange(3))


def test_so_does_a_replayed_loaders_whose_state_holds_arrays(root: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.randn(40, 3), 5, shuffle=True)
    Job(root, trainer_arguments={"dataloader": loader}).run(4)
    found = stored(root, "dataloader_state/train_dataloader_dprank000.pt")["dataloader_state_dict"]
    assert (found["kind"], found["drawn"]) == ("replayed", 4)


@pytest.mark.parametrize("place", ["iter_0000003/dataloader_state", "iter_0000003", "dataloader_state/iter_0000003"])
def test_another_programs_loader_state_is_found_in_each_of_its_places(root: Path, place: str) -> None:
    (root / place).mkdir(parents=True)
    for rank in range(2):
        (root / place / f"train_dataloader_dprank{rank:03d}.pt").write_bytes(encode_loader({"at": rank}))
    assert read_loader(root / "iter_0000003", FS, 1, 2) == ({"at": 1}, "")
    state, why = read_loader(root / "iter_0000003", FS, 0, 3)
    assert (state, why) == (None, "it was saved for 2 data-parallel ranks, and this start has 3")


def test_without_any_that_is_said(root: Path) -> None:
    assert read_loader(root / "iter_0000003", FS, 0, 1) == (None, "the checkpoint has none")


def test_another_programs_checkpoint_gives_the_loader_its_place(root: Path) -> None:
    Job(root, trainer_arguments={"dataloader": Stateful()}).run(4)
    for name in ("resilience.json", "integrity.json", "integrity_nested.json"):
        (root / "iter_0000004" / name).unlink()
    metadata = root / "iter_0000004" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"resilience/shard_0_1", b"resiliencX/shard_0_1"))
    loader = Stateful()
    job = Job(root.parent / "new", options={"load": str(root)}, trainer_arguments={"dataloader": loader}).run()
    assert (job.step, loader.at) == (4, 4)


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_malicious_loader_file_is_refused(root: Path) -> None:
    folder = root / "iter_0000003" / "dataloader_state"
    folder.mkdir(parents=True)
    torch.save({"dataloader_state_dict": Malicious()}, folder / "train_dataloader_dprank000.pt")
    with pytest.raises(CorruptCopyError, match="is refused"):
        read_loader(root / "iter_0000003", FS, 0, 1)
    torch.save([1], folder / "train_dataloader_dprank000.pt")
    with pytest.raises(CorruptCopyError, match="holds no dataloader_state_dict"):
        read_loader(root / "iter_0000003", FS, 0, 1)


# -- several ranks ----------------------------------------------------------------------------------------------------


def train(rank: int, root: str, steps: int | None, options: dict[str, Any], tp: int = 1) -> tuple[Any, dict[str, Any]]:
    """A start of this rank: what it loaded, and what it read of the checkpoint's tensors."""
    torch.manual_seed(0 if steps else 1 + rank)
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    read: list[str] = []
    import resilience.formats.torch_dist_reader as module

    original = module.TorchDistReader.read

    def reading(self: Any, targets: Any) -> None:
        read.extend(target.key for target in targets)
        original(self, targets)

    module.TorchDistReader.read = reading  # type: ignore[method-assign]
    layout = ParallelLayout(tp=tp) if tp > 1 else None
    checkpoint = CheckpointConfig(save=root, load=root, **options)
    resiliency = ResiliencyConfig(node_id="n", memory_dir=f"{root}-mem", exchange_timeout_s=30.0)
    with ResilientTrainer(
        model, optimizer, dataloader=Stateful(), layout=layout, checkpoint=checkpoint, resiliency=resiliency
    ) as trainer:
        loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if steps is not None:
            for _ in trainer.iterations(steps):
                model(torch.ones(2, 40) * (1 + trainer.iteration)).square().mean().backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                optimizer.step()
                optimizer.zero_grad()
            trainer.wait()
            loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return read, {name: tensor.tolist() for name, tensor in loaded.items()}


def start(size: int, *arguments: Any) -> Any:
    return run_ranks(size, train, *arguments, timeout_s=100)  # a few seconds on an idle machine


def test_every_data_parallel_rank_has_a_loader_file_and_tensor_parallel_ones_share_it(tmp_path: Path) -> None:
    values(start(2, str(tmp_path / "a"), 2, {}))
    values(start(2, str(tmp_path / "b"), 2, {}, 2))
    names = {place: sorted(path.name for path in tmp_path.glob(f"{place}/iter_*/dataloader_state/*")) for place in "ab"}
    assert names["a"] == ["train_dataloader_dprank000.pt", "train_dataloader_dprank001.pt"]
    assert names["b"] == ["train_dataloader_dprank000.pt"]
    config = yaml.safe_load((tmp_path / "b" / "iter_0000002" / "run_config.yaml").read_text())
    assert config["model"] == {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}


def test_ranks_share_the_writing_of_what_is_replicated_or_the_first_one_writes_it(tmp_path: Path) -> None:
    shares: dict[str, dict[str, int]] = {}
    for place, fully in (("shared", True), ("first", False)):
        values(start(2, str(tmp_path / place), 2, {"fully_parallel_save": fully}))
        metadata = FileSystemReader(tmp_path / place / "iter_0000002").read_metadata()
        written = shares.setdefault(place, {})
        for index, stored_at in metadata.storage_data.items():
            if not index.fqn.startswith("resilience/"):
                written[stored_at.relative_path] = written.get(stored_at.relative_path, 0) + stored_at.length
    assert sorted(shares["shared"]) == ["__0_0.distcp", "__1_0.distcp"]
    assert min(shares["shared"].values()) > 0.3 * sum(shares["shared"].values())
    assert sorted(shares["first"]) == ["__0_0.distcp"]
    for place in shares:
        outcomes = values(start(2, str(tmp_path / place), None, {}))
        assert outcomes[0][1]["0.weight"] == outcomes[1][1]["0.weight"]


def test_a_shared_load_reads_everything_once_and_gives_the_same_state(tmp_path: Path) -> None:
    root = str(tmp_path / "a")
    saved = values(start(3, root, 2, {}))
    alone = values(start(3, root, None, {}))
    shared = values(start(3, root, None, {"fully_parallel_load": True}))
    assert [state for _, state in shared] == [state for _, state in alone] == [state for _, state in saved]
    (first, *others) = [sorted(read) for read, _ in alone]
    assert others == [first, first], "each for itself: every rank reads everything"
    assert sorted(key for read, _ in shared for key in read) == first, "together: every key is read by one of them"
    assert all(read for read, _ in shared)


def test_missing_keys_are_what_no_rank_asks_for(tmp_path: Path) -> None:
    root = str(tmp_path / "a")
    values(start(2, root, 2, {}))
    values(start(2, root, None, {"dist_ckpt_strictness": "raise_all"}))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_file_is_held_against_its_digest_by_one_rank_and_all_read_about_as_much(root: Path, size: int) -> None:
    Job(root, trainer_arguments={"tokenizer": Tokenizer()}).run(4)
    folder = root / "iter_0000004"
    checkpoint = CheckpointConfig(save=str(root))
    shares = []
    for rank in range(size):
        loader = SharedLoader(
            checkpoint, FS, rank, size, True, lambda *_, **__: None, BoundedCalls(SYSTEM_THREADS, 60.0)
        )
        shares.append(loader._share(open_checkpoint(folder, FS)))
    listed = [name for share in shares for name in share]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert sorted(listed) == sorted(there - {"integrity.json"}), "each once"
    read = [sum((folder / name).stat().st_size for name in share) for share in shares]
    assert max(read) - min(read) <= max((folder / name).stat().st_size for name in there)
