"""A small GPT cut by tensor, pipeline, context and expert parallelism, which may resume under another layout.

    torchrun --nproc-per-node 4 examples/parallel_gpt.py --tp 2 --pp 2 --train-iters 20
    torchrun --nproc-per-node 2 examples/parallel_gpt.py --ep 2 --train-iters 40
    torchrun --nproc-per-node 4 examples/parallel_gpt.py --pp 2 --distributed-optimizer

Plain torch collectives, so that everything is in sight. What checkpoints need to know of the cutting is in two places:
`resilience.shard` where a parameter is made (`Cut`), and the `ParallelLayout` given to the trainer. Names are global:
layer 3 is `layers.3` on whichever stage it is, expert 5 `experts.5`, and the embedding, which the first stage and the
last one share, has one name on both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import resilience
from resilience import ParallelLayout

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, EXPERTS = 64, 16, 32, 4, 4, 4
BATCH = 8  # sequences of a step, over all ranks; each rank takes them in two halves (micro-batches) if it has as many


# -- who is where -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """This rank's place, and its process groups; a group of one is None."""

    place: ParallelLayout
    tp: Any
    cp: Any
    ep: Any
    replicas: Any  # dp × cp: the ranks with the same parameters
    expert_replicas: Any  # of these, the ones with the same experts
    ends: Any  # the first and the last stage, which share the embedding
    stages: tuple[int, ...]  # the ranks of this pipeline

    @classmethod
    def make(cls, layout: ParallelLayout, *, divided: bool = False) -> Groups:
        """Collective. Ranks with equal values of a key are one group. `divided`: an optimizer wants to know those of
        its replicas, also where there is one."""
        alone = not distributed.is_initialized()
        rank, world = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        places = [layout.resolve(each, world) for each in range(world)]
        mine = places[rank]

        def among(key: Any, least: int = 2) -> Any:
            members: dict[Any, list[int]] = {}
            for each, place in enumerate(places):
                members.setdefault(key(place), []).append(each)
            made = {name: distributed.new_group(ranks) for name, ranks in members.items() if len(ranks) >= least}
            return made.get(key(mine))

        def flat(place: Any) -> int:  # within dp × cp, as ParallelLayout counts experts
            return int(place.cp_rank + place.cp * place.dp_rank)

        model = lambda p: (p.pp_rank, p.tp_rank)  # noqa: E731
        least = 1 if divided and not alone else 2
        inner = lambda p: p.pp_rank if 0 < p.pp_rank < p.pp - 1 else -1  # noqa: E731
        return cls(
            mine,
            tp=among(lambda p: (p.pp_rank, flat(p))),
            cp=among(lambda p: (*model(p), p.dp_rank)),
            ep=among(lambda p: (*model(p), flat(p) // p.ep)),
            replicas=among(model, least),
            expert_replicas=among(lambda p: (*model(p), p.ep_rank), least),
            ends=among(lambda p: (p.tp_rank, flat(p), inner(p))) if mine.pp > 1 else None,
            stages=tuple(r for r, p in enumerate(places) if (p.tp_rank, flat(p)) == (mine.tp_rank, flat(mine))),
        )


# -- collectives with gradients ---------------------------------------------------------------------------------------


def _sum(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, group=group)
    return x


def _gather(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size(group))
    ]
    distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def _mine(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    return x.chunk(distributed.get_world_size(group), dim)[distributed.get_rank(group)]


class _Collective(torch.autograd.Function):
    """One operation forwards, another backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forwards: Any, backwards: Any) -> torch.Tensor:
        ctx.backwards = backwards
        return forwards(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.backwards(gradients[0]), None, None


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the group; gradients pass."""
    return x if group is None else _Collective.apply(x, lambda x: _sum(x, group), _same)


def spread(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The same on all; gradients are summed."""
    return x if group is None else _Collective.apply(x, _same, lambda g: _sum(g, group))


def joined(x: torch.Tensor, dim: int, group: Any, *, alike: bool) -> torch.Tensor:
    """The parts of all, one after the other. `alike`: all go on with the same, so that gradients are not summed."""
    if group is None:
        return x
    total = _same if alike else lambda g: _sum(g, group)
    return _Collective.apply(x, lambda x: _gather(x, dim, group), lambda g: _mine(total(g), dim, group).clone())


def own_sum(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """This rank's part of the sum over the group."""
    if group is None:
        return x
    return _Collective.apply(x, lambda x: _mine(_sum(x, group), dim, group).clone(), lambda g: _gather(g, dim, group))


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut over tensor-parallel ranks, and how it is said to the checkpoints."""

    groups: Groups
    dim: int
    stacked: int = 1

    def parameter(self, name: str, *shape: int) -> nn.Parameter:
        """This rank's part of what every layout begins with: the whole is drawn from the name."""
        tp, index = self.groups.place.tp, self.groups.place.tp_rank
        sections = initial(name, *shape).chunk(self.stacked, self.dim)
        part = torch.cat([section.chunk(tp, self.dim)[index] for section in sections], self.dim)
        made = nn.Parameter(part.clone())
        return resilience.shard(made, self.dim, index, tp, stacked=self.stacked)


def initial(name: str, *shape: int) -> torch.Tensor:
    """Normal values that depend on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


class Attention(nn.Module):
    """Heads over tensor parallelism; over context parallelism each rank has its stretch of the sequence."""

    def __init__(self, name: str, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = Cut(groups, 0, stacked=3).parameter(f"{name}.qkv", 3 * WIDTH, WIDTH)
        self.out = Cut(groups, 1).parameter(f"{name}.out", WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        place, size = self.groups.place, WIDTH // HEADS
        q, k, v = functional.linear(spread(x, self.groups.tp), self.qkv).chunk(3, -1)
        q, k, v = (each.view(batch, length, -1, size).transpose(1, 2) for each in (q, k, v))
        k, v = (joined(each, 2, self.groups.cp, alike=False) for each in (k, v))
        at = torch.arange(length) + (place.cp_rank or 0) * length
        seen = at[:, None] >= torch.arange(k.shape[2])[None, :]
        heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        heads = heads.transpose(1, 2).reshape(batch, length, -1)
        return summed(functional.linear(heads, self.out), self.groups.tp)


class GatedMLP(nn.Module):
    """Gate and up-projection are one matrix: on each rank its rows of the one, then its rows of the other."""

    def __init__(self, name: str, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.up = Cut(groups, 0, stacked=2).parameter(f"{name}.up", 4 * WIDTH, WIDTH)
        self.down = Cut(groups, 1).parameter(f"{name}.down", WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(spread(x, self.groups.tp), self.up).chunk(2, -1)
        return summed(functional.linear(functional.silu(gate) * up, self.down), self.groups.tp)


class Experts(nn.Module):
    """Each token goes to its best expert; a rank has some of the experts, under their global numbers."""

    def __init__(self, name: str, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        here = EXPERTS // groups.place.ep
        first = (groups.place.ep_rank or 0) * here
        self.router = nn.Parameter(initial(f"{name}.router", EXPERTS, WIDTH))
        self.experts = nn.ModuleDict(
            {str(n): GatedMLP(f"{name}.experts.{n}", groups) for n in range(first, first + here)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = joined(x.flatten(0, 1), 0, self.groups.ep, alike=False)
        weight, chosen = joined(
            functional.linear(x.flatten(0, 1), self.router).softmax(-1), 0, self.groups.ep, alike=False
        ).max(-1)
        result = torch.zeros_like(tokens)
        for number, expert in self.experts.items():
            mask = (chosen == int(number)).unsqueeze(-1)
            result = result + torch.where(mask, expert(tokens) * weight.unsqueeze(-1), 0.0)
        return own_sum(result, 0, self.groups.ep).view_as(x)


class Block(nn.Module):
    def __init__(self, number: int, groups: Groups, dropout: float) -> None:
        super().__init__()
        name = f"layers.{number}"
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(name, groups)
        self.mlp = Experts(name, groups) if number % 2 else GatedMLP(name, groups)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """One pipeline stage: some of the layers; the first one embeds, the last one knows the loss."""

    def __init__(self, groups: Groups, dropout: float) -> None:
        super().__init__()
        self.groups, place = groups, groups.place
        stage, here = place.pp_rank or 0, LAYERS // place.pp
        self.first, self.last = stage == 0, stage == place.pp - 1
        if self.first or self.last:
            self.token = Cut(groups, 0).parameter("token", VOCABULARY, WIDTH)
            self.token.shared_embedding = place.pp > 1  # two stages train it: a distributed optimizer has to know
        if self.first:
            self.place = nn.Parameter(initial("place", CONTEXT, WIDTH))
        numbers = range(stage * here, (stage + 1) * here)
        self.layers = nn.ModuleDict({str(number): Block(number, groups, dropout) for number in numbers})
        if self.last:
            self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`x`: tokens on the first stage, else what the stage before gave. The last stage sums the losses."""
        if self.first:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        if not self.last:
            return x
        logits = joined(
            functional.linear(spread(self.norm(x), self.groups.tp), self.token), -1, self.groups.tp, alike=True
        )
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, length = self.token.shape[0], tokens.shape[1]
        local = tokens - rows * (self.groups.place.tp_rank or 0)
        inside = (local >= 0) & (local < rows)
        found = functional.embedding(local.clamp(0, rows - 1), self.token) * inside.unsqueeze(-1)
        start = length * (self.groups.place.cp_rank or 0)
        return summed(found, self.groups.tp) + self.place[start : start + length]


# -- a step -----------------------------------------------------------------------------------------------------------


class Pipeline:
    """Micro-batches forwards through all stages, then backwards; gradients are summed over those that share them."""

    def __init__(self, model: Stage, groups: Groups) -> None:
        self.model, self.groups = model, groups
        stage = groups.place.pp_rank or 0
        self.before = groups.stages[stage - 1] if stage > 0 else None
        self.after = groups.stages[stage + 1] if not model.last else None

    def step(self, batch: torch.Tensor) -> float:
        """Gradients of the mean loss over the whole batch of all ranks, and that loss (on every rank)."""
        place = self.groups.place
        length = CONTEXT // place.cp
        here = slice((place.cp_rank or 0) * length, (place.cp_rank or 0) * length + length)
        tokens, targets = batch[:, :-1][:, here], batch[:, 1:][:, here]
        pieces = 2 if len(batch) > 1 else 1
        flowing = [self.forward(*each) for each in zip(tokens.chunk(pieces), targets.chunk(pieces), strict=True)]
        for given, made in flowing:
            self.backward(given, made)
        self.share_gradients()
        losses = [made.detach() for _, made in flowing]
        return self.total(torch.stack(losses).sum() if self.model.last else torch.zeros(()))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = tokens
        if self.before is not None:
            given = torch.empty(*tokens.shape, WIDTH)
            distributed.recv(given, self.before)
            given.requires_grad_()
        made = self.model(given, targets)
        if self.after is not None:
            distributed.send(made.detach().contiguous(), self.after)
        else:
            made = made / (BATCH * CONTEXT)
        return given, made

    def backward(self, given: torch.Tensor, made: torch.Tensor) -> None:
        gradient = None
        if self.after is not None:
            gradient = torch.empty_like(made)
            distributed.recv(gradient, self.after)
        made.backward(gradient)
        if self.before is not None:
            assert given.grad is not None
            distributed.send(given.grad.contiguous(), self.before)

    def share_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:  # an expert that no token chose
                parameter.grad = torch.zeros_like(parameter)
            group = self.groups.expert_replicas if ".experts." in name else self.groups.replicas
            if group is not None:
                distributed.all_reduce(parameter.grad, group=group)
        if self.groups.ends is not None and (self.model.first or self.model.last):
            distributed.all_reduce(self.model.token.grad, group=self.groups.ends)

    def total(self, loss: torch.Tensor) -> float:
        if distributed.is_initialized():
            if self.groups.replicas is not None:
                distributed.all_reduce(loss, group=self.groups.replicas)
            distributed.broadcast(loss, distributed.get_world_size() - 1)  # a rank of the last stage
        return loss.item()


# -- training ---------------------------------------------------------------------------------------------------------


class Text(Dataset[torch.Tensor]):
    """A made-up language: each token follows from the two before it, with some noise."""

    def __init__(self, length: int = 512) -> None:
        draw = torch.Generator().manual_seed(5)
        self.samples = torch.randint(0, VOCABULARY, (length, CONTEXT + 1), generator=draw)
        for at in range(2, CONTEXT + 1):
            self.samples[:, at] = (self.samples[:, at - 1] * 3 + self.samples[:, at - 2] + at % 3) % VOCABULARY

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.samples[index]


class Training:
    """Everything that a run consists of, on this rank."""

    def __init__(self, layout: ParallelLayout, dropout: float = 0.0, *, divided: bool = False) -> None:
        self.layout = layout
        self.groups = Groups.make(layout, divided=divided)
        place = self.groups.place
        self.model = Stage(self.groups, dropout)
        self.optimizers = self._divided_optimizers() if divided else [self._optimizer()]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda step: min(1.0, (step + 1) / 5)) for each in self.optimizers
        ]
        share = DistributedSampler(Text(), place.dp, place.dp_rank, seed=7, drop_last=True)
        self.loader = DataLoader(share.dataset, BATCH // (place.dp or 1), sampler=share, drop_last=True)
        # dropout draws alike on the ranks that hold the same activations, and differently on all others
        torch.manual_seed(1000 + 100 * (place.pp_rank or 0) + 10 * (place.dp_rank or 0) + (place.cp_rank or 0))

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(_trained(self.model.named_parameters()), lr=5e-3)

    def _divided_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for the experts, which fewer ranks have alike, and one for all else; a stage may have no experts."""
        named = list(self.model.named_parameters())
        experts = [each for each in named if ".experts." in each[0]]
        others = [each for each in named if ".experts." not in each[0]]
        return [
            resilience.DistributedOptimizer(_trained(each), torch.optim.AdamW, process_group=group, lr=5e-3)
            for each, group in ((others, self.groups.replicas), (experts, self.groups.expert_replicas))
        ]

    def trainer(self, **configs: Any) -> resilience.ResilientTrainer:
        """Resumes, if there is what to resume from."""
        one = len(self.optimizers) == 1
        return resilience.ResilientTrainer(
            self.model,
            self.optimizers[0] if one else self.optimizers,
            scheduler=self.schedulers[0] if one else self.schedulers,
            dataloader=self.loader,
            layout=self.layout,
            **configs,
        )

    def run(self, trainer: resilience.ResilientTrainer, train_iters: int) -> list[float]:
        """The losses of this start's steps."""
        pipeline, losses = Pipeline(self.model, self.groups), []
        for batch in trainer.iterations(train_iters):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            losses.append(pipeline.step(batch))
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            trainer.train_state.consumed_train_samples += BATCH
        return losses


def _trained(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two groups, either of which may be empty: matrices decay, vectors do not."""
    parameters = [parameter for _, parameter in named]
    matrices = [each for each in parameters if each.dim() > 1]
    vectors = [each for each in parameters if each.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--save", default="ckpt-parallel")
    parser.add_argument("--distributed-optimizer", action="store_true")
    for axis in ("tp", "pp", "cp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    layout = ParallelLayout(tp=args.tp, pp=args.pp, cp=args.cp, ep=args.ep)
    checkpoint = resilience.CheckpointConfig(
        save=args.save,
        load=args.save,
        save_interval=10,
        dist_ckpt_optim_fully_reshardable=True,  # a distributed optimizer's state too goes under any layout
    )
    training = Training(layout, args.dropout, divided=args.distributed_optimizer)
    with training.trainer(checkpoint=checkpoint) as trainer:
        began = trainer.iteration
        losses = training.run(trainer, args.train_iters)
    if os.environ.get("RANK", "0") == "0":
        for number, loss in enumerate(losses, began + 1):
            print(f"iteration {number:4d}  loss {loss:.4f}", flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
