"""Megatron Core's real distributed optimizer on a CPU, as a program: it saves known state, or loads and checks it.

    python optimizer_program.py save FOLDER --tp 2 --pp 1 --world 4 --layout dp_reshardable
    python optimizer_program.py load FOLDER --tp 1 --pp 2 --world 2
    python optimizer_program.py ours-save ROOT …          the same with this package's optimizer and trainer
    python optimizer_program.py ours-load ROOT …

A GPT under Megatron's DDP with `get_megatron_optimizer`, saved and loaded by its `sharded_state_dict` and
`dist_checkpointing`; the layout of a load is the one that the checkpoint's `content_metadata` names. Of torch five
calls are replaced by which Megatron Core assumes a GPU; of its own code one is helped along (`_keep_the_step`).
Prints one JSON document: what each rank has.
"""

from __future__ import annotations

import argparse
import json
import os
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

from tests.interop.megatron_gpt import FFN, HEADS, HIDDEN, LAYERS, MOMENTS, VOCABULARY, moment_key, whole  # noqa: E402

STEP, LR = 7, 0.125


def main_parameter(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """In float32; its rounding to bfloat16 is the weight."""
    return whole(moment_key("param", key), shape, torch.float32) / 256 + 1 / 3


def moment(kind: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    return main_parameter(key, shape) if kind == "param" else whole(moment_key(kind, key), shape, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "load", "ours-save", "ours-load"])
    parser.add_argument("folder", type=Path)
    for name in ("tp", "pp", "ep", "world"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--layout", default="fully_reshardable")
    parser.add_argument("--mem-efficient", action="store_true")
    parser.add_argument("--bf16-gradients", action="store_true")
    parser.add_argument("--bucket-size", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_rank, args=(options, meeting), nprocs=options.world)
        print((Path(meeting) / "told.json").read_text())


def _rank(rank: int, options: argparse.Namespace, meeting: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.world), LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.world, init_method=f"file://{meeting}/store")
    _pretend_a_gpu()
    job = _Job(options)
    told = getattr(job, options.what.replace("-", "_"))()
    parts: list[Any] = [None] * options.world
    dist.all_gather_object(parts, told)
    if rank == 0:
        (Path(meeting) / "told.json").write_text(json.dumps(parts))
    dist.barrier()
    dist.destroy_process_group()


def _pretend_a_gpu() -> None:
    """Megatron Core asks for the current device, synchronises it, makes tensors on it, and looks at type names."""
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    tensor, type_of = torch.tensor, torch.Tensor.type

    def on_cpu(*given: Any, **fields: Any) -> torch.Tensor:
        return tensor(*given, **{**fields, **({"device": "cpu"} if fields.get("device") == "cuda" else {})})

    def named_as_on_gpu(self: torch.Tensor, *given: Any, **fields: Any) -> Any:
        found = type_of(self, *given, **fields)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    torch.tensor, torch.Tensor.type = on_cpu, named_as_on_gpu  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


class _Job:
    """A model and an optimizer at one layout."""

    def __init__(self, options: argparse.Namespace) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.optimizer import (
            OptimizerConfig,
            get_megatron_optimizer,
            get_standard_config_overrides,
        )
        from megatron.core.transformer.transformer_config import TransformerConfig

        parallel_state.initialize_model_parallel(
            options.tp, options.pp, expert_model_parallel_size=options.ep, create_gloo_process_groups=True
        )
        self.options = options
        config = TransformerConfig(
            num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN, bf16=True,
            use_cpu_initialization=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
            tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp,
            expert_model_parallel_size=options.ep, num_moe_experts=options.experts or None,
            sequence_parallel=bool(options.experts) and options.tp > 1, add_bias_linear=not options.experts,
            gradient_accumulation_fusion=False,
        )  # fmt: skip
        model = GPTModel(
            config, get_gpt_layer_local_spec(num_experts=options.experts or None), vocab_size=VOCABULARY,
            max_sequence_length=32, pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(), position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).bfloat16().to(getattr(options, "device", "cpu"))  # fmt: skip
        distributed = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=not options.bf16_gradients,  # the buckets' keys name it
            bucket_size=options.bucket_size,
            overlap_grad_reduce=options.bucket_size is not None,  # else there is one bucket, whatever its size
        )
        self.inner = model
        if options.what.startswith("ours"):
            return
        self.model = DistributedDataParallel(config, distributed, model)
        adam = OptimizerConfig(
            optimizer="adam", lr=LR, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True,
            weight_decay=0.25,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(adam, [self.model], get_standard_config_overrides(adam))
        self.divided = self.optimizer.chained_optimizers  # experts have one of their own

    def _content(self) -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": self.options.layout,
            "distrib_optim_fully_reshardable_mem_efficient": self.options.mem_efficient,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }

    def _tensors(self, content: dict[str, Any]) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        described = self.inner.sharded_state_dict(metadata=content)
        return {name: part for name, part in described.items() if isinstance(part, ShardedTensor)}

    def save(self) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        content = self._content()
        for each in self.divided:
            each._init_optimizer_states_with_dummy_values()
        tensors = self._tensors(content)
        by_tensor = {id(part.data): part for part in tensors.values()}  # a save lets go of the tensors
        order = [by_tensor[id(parameter)] for parameter in self.model.parameters()]
        for parameter, part in zip(self.model.parameters(), order, strict=True):
            parameter.detach().copy_(self._expected(part, "param").to(torch.bfloat16))
        for optimizer, parameter, part, flat in self._kept(tensors):
            state = {kind: self._expected(part, kind).flatten()[flat] for kind in ("param", *MOMENTS)}
            optimizer._set_main_param_and_optimizer_states(parameter, {**state, "step": torch.tensor(float(STEP))})
        if dist.get_rank() == 0:
            self.options.folder.mkdir(parents=True)
        dist.barrier()
        described = {"tensors": tensors, "optimizer": self.optimizer.sharded_state_dict(tensors, metadata=content)}
        common = {"iteration": STEP, "checkpoint_version": 3.0, "content_metadata": content}
        dist_checkpointing.save(described | common, str(self.options.folder))
        return {
            "order": [
                [part.key, list(part.global_shape), list(part.global_offset), list(part.local_shape)] for part in order
            ],
            "buckets": [list(lengths.values()) for each in self.divided for lengths in each.per_bucket_numel_unpadded],
        }

    def load(self) -> dict[str, Any]:
        from megatron.core import dist_checkpointing

        content = dist_checkpointing.load_content_metadata(str(self.options.folder))
        for each in self.divided:
            each._init_optimizer_states_with_dummy_values()  # torch's Adam has no state before
        tensors = self._tensors(content)
        described = self.optimizer.sharded_state_dict(tensors, is_loading=True, metadata=content)
        kept = list(self._kept(tensors))  # a load lets go of the tensors
        loaded = dist_checkpointing.load({"tensors": tensors, "optimizer": described}, str(self.options.folder))
        for each in self.divided:
            _keep_the_step(each)
        self.optimizer.load_state_dict(loaded["optimizer"])
        checked = 0
        for optimizer, parameter, part, flat in kept:
            weight = loaded["tensors"][next(name for name, each in tensors.items() if each is part)]
            expected = self._expected(part, "param").to(torch.bfloat16)
            if not torch.equal(weight.reshape(part.local_shape), expected):
                raise AssertionError(f"{part.key} differs")
            found = optimizer._get_main_param_and_optimizer_states(parameter)
            for kind in ("param", *MOMENTS):
                if not torch.equal(found[kind].flatten(), self._expected(part, kind).flatten()[flat]):
                    raise AssertionError(f"{kind} of {part.key} differs")
            checked += 1
        # Of torch's Adam the parameters have steps too, which Megatron takes from before the load.
        if {group["step"] for group in self.optimizer.param_groups} != {STEP}:
            raise AssertionError(f"the groups' steps are {[group['step'] for group in self.optimizer.param_groups]}")
        groups = [[group["lr"], group["weight_decay"]] for group in self.optimizer.param_groups]
        return {"checked": checked, "groups": groups, "layout": content["distrib_optim_sharding_type"]}

    # -- the same with this package -----------------------------------------------------------------------------------

    def _trainer(self, **options: Any) -> Any:
        from megatron.core import parallel_state

        import resilience

        dense = [each for each in self.inner.parameters() if getattr(each, "allreduce", True)]
        experts = [each for each in self.inner.parameters() if not getattr(each, "allreduce", True)]
        self.ours = [self._divided(dense, parallel_state.get_data_parallel_group(with_context_parallel=True))]
        if experts:
            self.ours.append(self._divided(experts, parallel_state.get_expert_data_parallel_group()))
        checkpoint = resilience.CheckpointConfig(
            dist_ckpt_optim_fully_reshardable=self.options.layout == "fully_reshardable", **options
        )
        resiliency = resilience.ResiliencyConfig(memory_dir=f"{self.options.folder}-memory")
        layout = resilience.ParallelLayout(tp=self.options.tp, pp=self.options.pp, ep=self.options.ep)
        return resilience.ResilientTrainer(
            self.inner, self.ours, layout=layout, checkpoint=checkpoint, resiliency=resiliency
        )

    def _divided(self, parameters: list[torch.nn.Parameter], group: dist.ProcessGroup) -> Any:
        import resilience

        decayed = [each for each in parameters if each.dim() > 1]
        rest = [each for each in parameters if each.dim() == 1]
        groups = [{"params": decayed}, *([{"params": rest, "weight_decay": 0.0}] if rest else [])]
        return resilience.DistributedOptimizer(
            groups, torch.optim.AdamW, process_group=group, order=parameters, lr=LR, weight_decay=0.25
        )

    def ours_save(self) -> dict[str, Any]:
        by_tensor = {id(part.data): part for part in self._tensors(self._content()).values()}
        with self._trainer(save=str(self.options.folder)) as trainer:
            for step in trainer.iterations(STEP):
                for parameter in self.inner.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                for each in self.ours:
                    each.step()
                if step == STEP:
                    self._fill(by_tensor)
        return {"saved": STEP}

    def _fill(self, by_tensor: dict[int, Any]) -> None:
        with torch.no_grad():
            for parameter in self.inner.parameters():
                parameter.copy_(self._expected(by_tensor[id(parameter)], "param").to(torch.bfloat16))
            for optimizer, kept in self._slices():
                part, flat = by_tensor[id(kept.parameter)], slice(kept.start, kept.stop)
                kept.main.copy_(self._expected(part, "param").flatten()[flat])
                for kind in MOMENTS:
                    optimizer.state_of(kept)[kind].copy_(self._expected(part, kind).flatten()[flat])

    def ours_load(self) -> dict[str, Any]:
        by_tensor = {id(part.data): part for part in self._tensors(self._content()).values()}
        checked = 0
        with self._trainer(load=str(self.options.folder)) as trainer:
            found = trainer.resumed_from
            if found is None or any("optimizer" in note for note in found.notes):
                raise AssertionError(f"not all was taken: {found}")
            for optimizer, kept in self._slices():
                part, flat = by_tensor[id(kept.parameter)], slice(kept.start, kept.stop)
                weight = self._expected(part, "param").to(torch.bfloat16)
                if not torch.equal(kept.parameter, weight):
                    raise AssertionError(f"{part.key} differs")
                state = {"param": kept.main, **optimizer.state_of(kept)}
                for kind in ("param", *MOMENTS):
                    if not torch.equal(state[kind].flatten(), self._expected(part, kind).flatten()[flat]):
                        raise AssertionError(f"{kind} of {part.key} differs")
                if state["step"] != STEP:
                    raise AssertionError(f"the step of {part.key} is {state['step']}")
                checked += 1
        groups = [[group["lr"], group["weight_decay"]] for each in self.ours for group in each.param_groups]
        notes = list(found.notes) if found is not None else []
        return {"iteration": found and found.iteration, "checked": checked, "groups": groups, "notes": notes}

    def _slices(self) -> Any:
        return ((each, kept) for each in self.ours for kept in each.slices())

    def _kept(self, tensors: dict[str, Any]) -> Any:
        """Optimizer, parameter, its part of the whole, and which of its elements this rank keeps the state of."""
        by_tensor = {id(part.data): part for part in tensors.values()}
        for optimizer in self.divided:
            found = (bucket for buffer in optimizer.gbuf_ranges for buckets in buffer.values() for bucket in buckets)
            for bucket in found:
                for parameter, ranges in bucket["param_map"].items():
                    flat = slice(ranges["param"].start, ranges["param"].end)
                    yield optimizer, parameter, by_tensor[id(parameter)], flat

    def _expected(self, part: Any, kind: str) -> torch.Tensor:
        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        region = tuple(slice(at, at + length) for at, length in zip(part.global_offset, shape, strict=True))
        return moment(kind, part.key, tuple(part.global_shape))[region].reshape(part.local_shape)


def _keep_the_step(optimizer: Any) -> None:
    """With torch's own Adam in it, Megatron's optimizer asks this layout for a step, which it has from the groups
    already, and fails without (`load_parameter_state_from_fully_reshardable`)."""
    put = optimizer._set_main_param_and_optimizer_states

    def with_step(parameter: torch.Tensor, tensors: dict[str, Any]) -> None:
        known = optimizer._get_main_param_and_optimizer_states(parameter)
        put(parameter, {"step": known["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = with_step


if __name__ == "__main__":
    main()
