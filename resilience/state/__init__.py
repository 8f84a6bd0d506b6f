"""Training state: what belongs to it, under which names, and how it is put back bit for bit.

`TrainingState.collect` gives items and values; `TrainingState.plan_load` says which tensors a load has to fill.
"""

from resilience.state.dataloader import LoaderCursor
from resilience.state.digest import state_digest
from resilience.state.items import Collected, Item, SavedItem, items_of
from resilience.state.load_plan import LoadPlan
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.sharding import shard, shard_at
from resilience.state.train_state import TrainState
from resilience.state.training_state import PARTS, TrainingState
from resilience.state.tree import decode, encode

__all__ = [
    "PARTS",
    "Collected",
    "Item",
    "LoadPlan",
    "LoaderCursor",
    "ParallelLayout",
    "SavedItem",
    "TrainState",
    "TrainingState",
    "decode",
    "encode",
    "items_of",
    "shard",
    "shard_at",
    "state_digest",
]
