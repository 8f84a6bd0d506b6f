"""An optimizer whose state is divided over the data-parallel ranks (ZeRO stage 1), flat, in float32.

    optimizer = DistributedOptimizer(model.parameters(), torch.optim.AdamW, process_group=data_parallel, lr=3e-4)

Each rank keeps main parameters in float32, and the moments, for an equal part of every bucket; after a step the parts
are gathered into the parameters. Gradients have to be equal on all ranks of the group when `step` is called, as
DistributedDataParallel leaves them. (S. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2020; buckets as in Megatron Core.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from resilience.errors import ConfigError
from resilience.planning.flat import FlatBucket, plan_buckets

__all__ = ["DistributedOptimizer", "Slice"]


#: Torch 2.13 renamed it; the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Slice:
    """The part of one parameter that this rank keeps: its elements `start` to `stop` in C order.

    `main`: float32, live, one-dimensional (without dimensions where the parameter has none). `bucket` and
    `bucket_start` say where it lies.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    main: torch.nn.Parameter
    bucket: int
    bucket_start: int


class DistributedOptimizer(torch.optim.Optimizer):
    """`optimizer_class` over this rank's part of the parameters; groups and hyperparameters as of any optimizer.

    `process_group`: the ranks that share the state (default: all; without torch.distributed this process alone).
    `bucket_numel`: elements from which on a bucket is closed (None: one bucket for each dtype). `order`: the same
    parameters in the order in which they are laid out (default: that of the groups); with `model.parameters()` it is
    Megatron Core's. `defaults` go to `optimizer_class`, which has to work element by element, as SGD, Adam and AdamW
    do.

    A parameter that is tied over pipeline stages is trained by the groups of both: give it a true attribute
    `shared_embedding`, as Megatron Core does. It then lies in a bucket of its own, and is divided alike everywhere.

    Collective: every rank of the group makes it, and calls `step`, in the same order. The parameters' data become views
    of the buckets: make it before anything else keeps views of them.
    """

    def __init__(
        self,
        params: Any,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        *,
        process_group: dist.ProcessGroup | None = None,
        bucket_numel: int | None = None,
        order: Iterable[torch.nn.Parameter] | None = None,
        **defaults: Any,
    ) -> None:
        if bucket_numel is not None and bucket_numel < 1:
            raise ConfigError(f"bucket_numel is {bucket_numel}; a count of elements from 1 on is expected.")
        self._planned = False
        super().__init__(params, defaults)
        self.process_group = process_group
        alone = not dist.is_initialized()
        self.rank = 0 if alone else dist.get_rank(process_group)
        self.size = 1 if alone else dist.get_world_size(process_group)
        grouped = [_checked(each) for group in self.param_groups for each in group["params"]]
        self.laid_out = grouped if order is None else list(order)
        if {*map(id, self.laid_out)} != {*map(id, grouped)} or len(self.laid_out) != len(grouped):
            raise ConfigError(
                f"order has {len(self.laid_out)} parameters, and they are not the {len(grouped)} that are trained."
            )
        dtypes = [str(each.dtype).removeprefix("torch.") for each in self.laid_out]
        numels = [each.numel() for each in self.laid_out]
        # What several groups train has to be divided alike in all of them, whatever else each of them has.
        shared = [n for n, each in enumerate(self.laid_out) if getattr(each, "shared_embedding", False)]
        self.buckets: tuple[FlatBucket, ...] = plan_buckets(numels, dtypes, self.size, bucket_numel, shared)
        self._flat = [self._moved_into_one(bucket) for bucket in self.buckets]
        self._mains = [self._main_of(number) for number in range(len(self.buckets))]
        self._slices: dict[torch.nn.Parameter, Slice] = {each.parameter: each for each in self._cut()}
        self.inner = optimizer_class(self._inner_groups(), **defaults)
        self._planned = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is being made: the buckets are planned once. ConfigError afterwards."""
        if self._planned:
            raise ConfigError(
                "A DistributedOptimizer takes no further param group: its buckets are planned once.",
                advice="Give all groups when it is made.",
            )
        super().add_param_group(param_group)

    def slices(self) -> Iterator[Slice]:
        """What this rank keeps, in the order of the groups; parameters of which it keeps nothing are left out."""
        trained = (each for group in self.param_groups for each in group["params"])
        return (self._slices[each] for each in trained if each in self._slices)

    def state_of(self, part: Slice) -> dict[str, Any]:
        """The inner optimizer's state of a part: tensors of its length, and scalars; empty before the first step."""
        return self.inner.state[part.main] if part.main in self.inner.state else {}  # noqa: SIM401 - it is a defaultdict

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step on this rank's part, then the parts of all ranks into the parameters. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in outer.items() if name != "params"})
        for each in self._slices.values():
            grad = each.parameter.grad
            if grad is not None:
                grad = grad.reshape(-1)[each.start : each.stop].view_as(each.main).to(torch.float32)
            each.main.grad = grad
        self.inner.step()
        for each in self._slices.values():
            each.main.grad = None
        self.publish()
        return loss

    @torch.no_grad()
    def publish(self) -> None:
        """Put what the main parameters hold into the parameters, on all ranks. Collective over the group."""
        for bucket, flat, main in zip(self.buckets, self._flat, self._mains, strict=True):
            share = bucket.share(self.rank, self.size)
            mine = flat[share.start : share.stop]
            if main.data_ptr() != mine.data_ptr():
                mine.copy_(main)
            if self.size > 1:
                # As bytes: gloo does not know every dtype.
                _all_gather(flat.view(torch.uint8), mine.clone().view(torch.uint8), group=self.process_group)

    @torch.no_grad()
    def remake_main_parameters(self) -> None:
        """Main parameters anew from the parameters, which somebody else has changed. Not collective."""
        for bucket, flat, main in zip(self.buckets, self._flat, self._mains, strict=True):
            share = bucket.share(self.rank, self.size)
            main.copy_(flat[share.start : share.stop])

    def state_dict(self) -> dict[str, Any]:
        """This rank's part only, for a load at the same layout; a checkpoint that can be loaded at any is made by
        `ResilientTrainer`."""
        return {"inner": self.inner.state_dict(), "main": list(self._mains)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave on the same rank of an equal layout; ConfigError for another. Not collective."""
        found, here = ([tuple(main.shape) for main in mains] for mains in (state_dict["main"], self._mains))
        if found != here:
            raise ConfigError(f"The state is of buckets with parts {found}; here they are {here}.")
        for main, its in zip(self._mains, state_dict["main"], strict=True):
            main.copy_(its)
        self.inner.load_state_dict(state_dict["inner"])

    def _moved_into_one(self, bucket: FlatBucket) -> torch.Tensor:
        """A buffer that the bucket's parameters are views of from now on; the gaps are zeros."""
        first = self.laid_out[bucket.placed[0].index]
        flat = torch.zeros(bucket.numel, dtype=first.dtype, device=first.device)
        for placed in bucket.placed:
            parameter = self.laid_out[placed.index]
            part = flat[placed.start : placed.stop].view(parameter.shape)
            part.copy_(parameter.detach())
            parameter.data = part
        return flat

    def _main_of(self, number: int) -> torch.Tensor:
        """This rank's part in float32: of a float32 bucket the part itself."""
        share = self.buckets[number].share(self.rank, self.size)
        return self._flat[number][share.start : share.stop].to(torch.float32)

    def _cut(self) -> Iterable[Slice]:
        for number, (bucket, main) in enumerate(zip(self.buckets, self._mains, strict=True)):
            share = bucket.share(self.rank, self.size)
            for placed in bucket.placed:
                start, stop = max(placed.start, share.start), min(placed.stop, share.stop)
                if start >= stop:
                    continue
                parameter = self.laid_out[placed.index]
                part = main[start - share.start : stop - share.start]
                part = torch.nn.Parameter(part if parameter.dim() else part.view(()), requires_grad=True)
                yield Slice(parameter, start - placed.start, stop - placed.start, part, number, start)

    def _inner_groups(self) -> list[dict[str, Any]]:
        groups = []
        for group in self.param_groups:
            mains = [self._slices[each].main for each in group["params"] if each in self._slices]
            groups.append({**{name: value for name, value in group.items() if name != "params"}, "params": mains})
        return groups


def _checked(parameter: torch.Tensor) -> torch.nn.Parameter:
    if not isinstance(parameter, torch.nn.Parameter) or type(parameter.data) is not torch.Tensor:
        raise ConfigError(
            f"A DistributedOptimizer takes plain parameters, not a {type(parameter).__name__} "
            f"over a {type(parameter.data).__name__}.",
            advice="FSDP2 and DTensor parameters have sharded optimizer state already.",
        )
    if not parameter.is_floating_point() or not parameter.numel():
        raise ConfigError(
            f"A parameter of dtype {parameter.dtype} and shape {list(parameter.shape)} cannot be trained."
        )
    return parameter
