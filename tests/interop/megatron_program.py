"""The real Megatron Core on a CPU, as a program: it saves a GPT with known values, or loads one and checks every value.

    python megatron_program.py save FOLDER --tp 2 --pp 1 --world 4
    python megatron_program.py load FOLDER --tp 1 --pp 2 --world 2

Run by an interpreter that has Megatron Core. Each value follows from its tensor's key and its place in the whole, so
that both sides know what to expect without exchanging it. Prints one JSON document: key → global shape of every tensor
that was saved, or that was loaded and found right.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

LAYERS, HIDDEN, HEADS, FFN, VOCABULARY = 4, 16, 4, 32, 64
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the tensor `key` holds: whole numbers below 256, which bfloat16 has exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + zlib.crc32(key.encode())) % 256).to(dtype).reshape(shape)


def moment_key(moment: str, key: str) -> str:
    """Where Megatron Core's fully reshardable layout has the optimizer's state of a parameter."""
    return f"optimizer.state.{moment}.{key}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "load"])
    parser.add_argument("folder", type=Path)
    for name in ("tp", "pp", "world"):
        parser.add_argument(f"--{name}", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_rank, args=(options, meeting), nprocs=options.world)
        print((Path(meeting) / "told.json").read_text())


def _rank(rank: int, options: argparse.Namespace, meeting: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.world), LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.world, init_method=f"file://{meeting}/store")
    # The two calls by which Megatron Core's writer and reader assume a GPU.
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: "cpu"
    tensors = _sharded_tensors(options.tp, options.pp)
    told = _save(options.folder, tensors) if options.what == "save" else _load(options.folder, tensors)
    parts: list[Any] = [None] * options.world
    dist.all_gather_object(parts, told)
    if rank == 0:
        (Path(meeting) / "told.json").write_text(
            json.dumps({key: shape for part in parts for key, shape in part.items()})
        )
    dist.barrier()
    dist.destroy_process_group()


def _sharded_tensors(tp: int, pp: int) -> dict[str, Any]:
    """The model's sharded state dict at this layout, its tensors only, and the optimizer's moments beside them."""
    from dataclasses import replace

    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(tp, pp)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    found = {name: part for name, part in model.sharded_state_dict().items() if isinstance(part, ShardedTensor)}
    tensors = dict(found)
    for name, part in found.items():
        for moment in MOMENTS:
            state = torch.zeros(part.data.shape, dtype=torch.float32)
            changed = {"key": moment_key(moment, part.key), "data": state, "dtype": torch.float32}
            tensors[f"{moment}.{name}"] = replace(part, **changed)
    return tensors


def _expected(part: Any) -> torch.Tensor:
    region = tuple(
        slice(start, start + length)
        for start, length in zip(
            part.global_offset, (1,) * part.prepend_axis_num + tuple(part.local_shape), strict=True
        )
    )
    return whole(part.key, tuple(part.global_shape), part.dtype)[region].reshape(part.local_shape)


def _save(folder: Path, tensors: dict[str, Any]) -> dict[str, list[int]]:
    from megatron.core import dist_checkpointing

    for part in tensors.values():
        part.data.detach().copy_(_expected(part))
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    content = {"distrib_optim_sharding_type": "fully_reshardable"}
    dist_checkpointing.save(
        {"tensors": tensors, "iteration": 7, "checkpoint_version": 3.0, "content_metadata": content}, str(folder)
    )
    return {part.key: list(part.global_shape) for part in tensors.values()}


def _load(folder: Path, tensors: dict[str, Any]) -> dict[str, list[int]]:
    from megatron.core import dist_checkpointing

    for part in tensors.values():
        part.data.detach().zero_()
    loaded = dist_checkpointing.load({"tensors": tensors}, str(folder))
    for name, part in tensors.items():
        found = loaded["tensors"][name]
        if not torch.equal(found.reshape(part.local_shape), _expected(part)):
            raise AssertionError(f"{name} ({part.key}) differs")
    return {part.key: list(part.global_shape) for part in tensors.values()}


if __name__ == "__main__":
    main()
