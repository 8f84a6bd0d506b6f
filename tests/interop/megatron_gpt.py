"""A GPT of the real Megatron Core on a CPU, small, with known values: what both sides of the interoperability build.

Run by an interpreter that has Megatron Core. Each value follows from its tensor's key and its place in the whole, so
that both sides know what to expect without exchanging it.
"""

from __future__ import annotations

import os
import sys
import zlib
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "MOMENTS",
    "Layout",
    "expected",
    "fill",
    "gpt",
    "join",
    "keep_extra_state",
    "moment_key",
    "parts_of",
    "stand_in_for_triton",
    "whole",
]

LAYERS, HIDDEN, HEADS, FFN, VOCABULARY = 4, 16, 4, 32, 64
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """`gated`: with SwiGLU projections, of which each rank has two parts; `experts`: of each layer, none for 0."""

    tp: int = 1
    pp: int = 1
    world: int = 1
    ep: int = 1
    gated: bool = False
    experts: int = 0
    tied: bool = False

    @property
    def options(self) -> list[str]:
        sizes = [f"--{name}={getattr(self, name)}" for name in ("tp", "pp", "world", "ep", "experts")]
        return sizes + [f"--{name}" for name in ("gated", "tied") if getattr(self, name)]


def whole(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the tensor `key` holds: whole numbers below 256, which bfloat16 has exactly."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + zlib.crc32(key.encode())) % 256).to(dtype).reshape(shape)


def moment_key(moment: str, key: str) -> str:
    """Where Megatron Core's fully reshardable layout has the optimizer's state of a parameter."""
    return f"optimizer.state.{moment}.{key}"


def stand_in_for_triton() -> None:
    """Newer versions of Megatron Core are not imported without a compiler of GPU kernels, of which a CPU runs none."""
    if version("megatron-core") < "0.17":
        return
    import_module("torch._inductor.compile_fx")  # looks for the real one, and goes on without it from then on
    from torch.utils._triton import has_triton_package

    if not has_triton_package():
        for name in ("triton", "triton.language"):
            sys.modules[name] = _StandIn(name)
        sys.modules["triton"].language = sys.modules["triton.language"]  # type: ignore[attr-defined]


class _StandIn(ModuleType):
    """Whatever is asked of it is a decorator that changes nothing, or a type that is never made."""

    __version__ = "3.4.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return int if self.__name__.endswith("language") else _unchanged


def _unchanged(*given: Any, **options: Any) -> Any:
    return given[0] if len(given) == 1 and callable(given[0]) and not options else _unchanged


def join(rank: int, layout: Layout, meeting: str) -> None:
    """Become a rank of a job of Megatron's."""
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.world), LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=layout.world, init_method=f"file://{meeting}/store")
    # The calls by which Megatron Core's writer, its reader, and tied embeddings assume a GPU.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, expert_model_parallel_size=layout.ep)


def gpt(layout: Layout) -> Any:
    """This rank's part of the model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        sequence_parallel=bool(layout.experts) and layout.tp > 1,
        gradient_accumulation_fusion=False,
        gated_linear_unit=layout.gated,
        add_bias_linear=not layout.experts,
        num_moe_experts=layout.experts or None,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=layout.experts or None),
        vocab_size=VOCABULARY,
        max_sequence_length=32,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=layout.tied,
    )


def parts_of(described: Any) -> list[Any]:
    """The sharded tensors that an entry of a sharded state dict is stored as; an object has none."""
    kind = type(described).__name__
    if kind == "ShardedTensorFactory":
        return list(described.build())
    return [described] if kind == "ShardedTensor" else []


def expected(part: Any, key: str, dtype: torch.dtype) -> torch.Tensor:
    """What this rank's part of the tensor `key` holds."""
    lengths = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    region = tuple(slice(at, at + length) for at, length in zip(part.global_offset, lengths, strict=True))
    return whole(key, tuple(part.global_shape), dtype)[region].reshape(part.local_shape)


def fill(model: Any) -> None:
    """Give every tensor of the model its known value, and the attention's last projections some extra state."""
    for name, described in model.sharded_state_dict().items():
        for part in parts_of(described):
            part.data.detach().copy_(expected(part, part.key, part.data.dtype))
        if name.endswith("linear_proj._extra_state"):
            kept = whole(described.unique_key, (5,), torch.uint8)
            model.get_submodule(name.removesuffix("._extra_state")).kept = kept


def keep_extra_state() -> None:
    """Make Megatron's local layers keep what they are given, as Transformer Engine's do; else they have None."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    RowParallelLinear.get_extra_state = lambda self: getattr(self, "kept", None)  # type: ignore[method-assign]
    RowParallelLinear.set_extra_state = lambda self, state: setattr(self, "kept", state)  # type: ignore[method-assign]
