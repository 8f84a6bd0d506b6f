"""A loop as Megatron's, with the real Megatron Core, its distributed optimizer and its local checkpoints, on CPUs.

    python megatron_local_program.py ROOT --steps 8 --every 2 [--dies-at 5] [--algo fully_parallel] [--async-save]
    python megatron_local_program.py ROOT --ranks 1 --device cuda …     the same on a GPU, with nothing replaced

Data-parallel ranks, each a node of its own below ROOT. What is done with checkpoints, and in which order, is what
Megatron's training loop does with them; the manager comes through the very imports that it makes. Prints one JSON
document: of each rank its loss at each step, from which iteration it went on, and a digest of what it ends with.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from tests.interop.megatron_gpt import VOCABULARY  # noqa: E402
from tests.interop.optimizer_program import _Job, _keep_the_step, _pretend_a_gpu  # noqa: E402

LENGTH = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--dies-at", type=int, default=0)
    parser.add_argument("--algo", default="fully_parallel")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        ranks = mp.spawn(_rank, args=(options, meeting), nprocs=options.ranks, join=False)
        try:
            while not ranks.join():
                pass
        except mp.ProcessExitedException as error:  # and the others are ended, as a launcher does it
            if not options.dies_at or error.signal_name != "SIGKILL":
                raise
            print(json.dumps("died"))
            return
        told = [json.loads((Path(meeting) / f"told-{rank}.json").read_text()) for rank in range(options.ranks)]
        print(json.dumps(told))


def _rank(rank: int, options: argparse.Namespace, meeting: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=options.ranks, init_method=f"file://{meeting}/store")
    if options.device == "cpu":
        _pretend_a_gpu()
        empty_like = torch.empty_like  # which its exchange of shards asks for on a GPU
        torch.empty_like = lambda tensor, **fields: empty_like(tensor, **{**fields, "device": tensor.device})  # type: ignore[assignment]
    told = _Loop(rank, options).run()
    (Path(meeting) / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


class _Loop:
    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        from megatron.core import tensor_parallel

        torch.manual_seed(1)
        self.rank, self.options = rank, options
        self.job = _Job(
            argparse.Namespace(
                what="save", folder=options.root, tp=1, pp=1, ep=1, world=options.ranks, experts=0,
                layout="dp_reshardable",
                mem_efficient=False, bf16_gradients=False, bucket_size=None, device=options.device,
            )
        )  # fmt: skip
        if options.device == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        else:
            self._without_a_gpu(type(tensor_parallel.get_cuda_rng_tracker()))
        self.manager = self._manager()
        self.requests: list[Any] = []

    def _without_a_gpu(self, tracker: Any) -> None:
        tracker.fork = lambda self, *_: contextlib.nullcontext()  # of GPUs' random numbers
        for each in (self.job.optimizer, *self.job.divided):
            each.get_grad_norm = lambda *_, **__: 0.0  # which it works out on a GPU

    def _manager(self) -> Any:
        """As Megatron's `init_checkpointing_context`, after the one line of ours."""
        from resilience.integrations.megatron import use_local_checkpoints

        use_local_checkpoints(timeout_s=30.0)
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

        copies = min(2, self.options.ranks)
        strategy = CliqueReplicationStrategy.from_replication_params(1, copies) if copies > 1 else None
        return LocalCheckpointManager(str(self.options.root / f"node{self.rank}"), repl_strategy=strategy)

    def run(self) -> dict[str, Any]:
        came_from = self._load()
        losses = []
        for step in range(came_from, self.options.steps):
            losses.append(self._step(step))
            self._finalize(blocking=False)
            if (step + 1) % self.options.every == 0:
                self._save(step + 1)
            if self.rank == 1 and step + 1 == self.options.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
        self._finalize(blocking=True)
        return {"from": came_from, "losses": losses, "digest": self._digest(), "files": self._files()}

    def _step(self, step: int) -> float:
        torch.manual_seed(1000 * self.rank + step)
        where = self.options.device
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH)).to(where)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1).to(where)
        positions = torch.arange(LENGTH).expand(2, LENGTH).to(where)
        self.job.model.zero_grad_buffer()
        self.job.optimizer.zero_grad()
        loss = self.job.model(tokens, positions, mask, labels=tokens).mean()
        loss.backward()
        self.job.model.finish_grad_sync()
        assert self.job.optimizer.step()[0]
        return float(loss)

    def _described(self, *, loading: bool) -> dict[str, Any]:
        content = self.job._content()
        model = self.job.inner.sharded_state_dict(metadata=content)
        optimizer = self.job.optimizer.sharded_state_dict({"model": model}, is_loading=loading, metadata=content)
        return {"model": model, "optimizer": optimizer}

    def _save(self, iteration: int) -> None:
        from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

        described = self._described(loading=False) | {
            "iteration": iteration, "args": _arguments(), "rng": _generators().get_states()
        }  # fmt: skip
        state, _ = MCoreTensorAwareStateDict.from_state_dict(
            described, algo=self.options.algo, parallelization_group=dist.group.WORLD
        )
        request = self.manager.save(state, iteration, is_async=self.options.async_save)
        if request is not None:
            request.add_finalize_fn(lambda: None)
            self.requests.append(request.freeze())

    def _finalize(self, *, blocking: bool) -> None:
        """As its queue does: what is written, on all ranks, is finalized."""
        if blocking or len(self.requests) > 1:
            for request in self.requests:
                request.execute_sync()
            self.requests.clear()

    def _load(self) -> int:
        if self.manager.find_latest() == -1:
            return 0
        for each in self.job.divided:
            each._init_optimizer_states_with_dummy_values()
        state, _ = self.manager.load()
        described = self._described(loading=True)
        loaded = state.to_state_dict(described, algo=self.options.algo, parallelization_group=dist.group.WORLD)
        assert loaded["args"] == _arguments()
        _generators().set_states(loaded["rng"])
        self.job.inner.load_state_dict(loaded["model"])
        for each in self.job.divided:
            _keep_the_step(each)
        self.job.optimizer.load_state_dict(loaded["optimizer"])
        for each in self.job.divided:
            _count_on(each.optimizer)
        return int(loaded["iteration"])

    def _digest(self) -> str:
        mixed = hashlib.sha256()
        for parameter in self.job.model.parameters():
            mixed.update(parameter.detach().float().cpu().numpy().tobytes())
        for each in self.job.divided:
            for group in each.optimizer.param_groups:
                for main in group["params"]:
                    for kind, value in sorted(each.optimizer.state[main].items()):
                        mixed.update(kind.encode() + torch.as_tensor(value).float().cpu().numpy().tobytes())
                    mixed.update(main.detach().cpu().numpy().tobytes())
        return mixed.hexdigest()

    def _files(self) -> list[str]:
        return sorted(path.name for path in Path(self.manager.local_ckpt_dir).iterdir())


def _generators() -> Any:
    """Of random numbers on GPUs."""
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()


def _arguments() -> argparse.Namespace:
    """What Megatron keeps beside tensors is of such kinds."""
    from megatron.core.rerun_state_machine import Call, Caller, RerunMode
    from megatron.core.transformer.enums import AttnBackend

    call = Call(Caller("loss", 3), 1)
    return argparse.Namespace(
        seed=1, params_dtype=torch.bfloat16, attention_backend=AttnBackend.auto, mode=RerunMode.DISABLED, call=call
    )


def _count_on(adam: torch.optim.Optimizer) -> None:
    """Megatron loads the number of steps into the groups, where a GPU's Adam has it; torch's has it by parameter."""
    for group in adam.param_groups:
        for main in group["params"]:
            if isinstance(adam.state[main].get("step"), torch.Tensor):
                adam.state[main]["step"] = torch.tensor(float(group["step"]))


if __name__ == "__main__":
    main()
