"""Train a small GPT on the source text of Python's standard library, and survive the loss of a node.

    torchrun --nproc-per-node 2 examples/gpt.py --train-iters 200
    resilience drill --nodes 4 --fault lose:node=2@35

Byte tokens, torch only. What makes it survive is the three lines around `ResilientTrainer`; where the checkpoints go
is read from the environment (`RESILIENCE_CHECKPOINT__SAVE=...`), which is how a drill points it at its own nodes.
"""

import argparse
import os
import sysconfig
from collections import deque
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import resilience

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 3


class StandardLibrary(Dataset[torch.Tensor]):
    """Windows of CONTEXT + 1 bytes from the standard library's top-level modules, in the order of their names."""

    def __init__(self, max_bytes: int = 4_000_000) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[:max_bytes]
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // CONTEXT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tokens[index * CONTEXT : (index + 1) * CONTEXT + 1].long()


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, WIDTH)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Next-byte model; `forward` takes (batch, CONTEXT + 1) int64 tokens and returns the mean loss in nats."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens[:, :-1]) + self.place.weight
        logits = self.norm(self.blocks(x)) @ self.token.weight.T
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank and step")
    parser.add_argument("--dropout", type=float, default=0.1)  # above 0, so that the random state matters
    args = parser.parse_args()

    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(1234)
    model: nn.Module = GPT(args.dropout)
    loader: DataLoader[torch.Tensor]
    dataset = StandardLibrary()
    if distributed.is_initialized():
        # After its first step DDP rebuilds its gradient buckets, which changes the order in which a ring of more than
        # two ranks adds numbers, hence the last bits of a run that was restarted. With find_unused_parameters=True it
        # does not rebuild. Only needed to compare two runs bit for bit; training is as good without.
        model = DistributedDataParallel(model, find_unused_parameters=True)
        loader = DataLoader(dataset, args.batch, sampler=DistributedSampler(dataset, seed=7), drop_last=True)
        torch.manual_seed(1234 + distributed.get_rank())  # every rank draws its own dropout
    else:
        loader = DataLoader(dataset, args.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    recent: deque[float] = deque(maxlen=5)  # a single batch's loss is noisy
    config, resiliency = resilience.load_config(args=[])
    with resilience.ResilientTrainer(
        model, optimizer, scheduler=scheduler, dataloader=loader, checkpoint=config, resiliency=resiliency
    ) as trainer:
        for batch in trainer.iterations(args.train_iters):
            loss = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            if trainer.iteration % 5 == 4 and int(os.environ.get("RANK", "0")) == 0:
                print(f"iteration {trainer.iteration + 1:4d}  loss {sum(recent) / len(recent):.3f}", flush=True)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
