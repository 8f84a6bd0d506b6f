"""What is saved and loaded, how often and where: Megatron Bridge's `CheckpointConfig`, field for field.

Names, defaults and literals are those of Megatron Bridge's checkpointing page; nothing is added.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from resilience.config.setting import Rule, at_least, check_all, setting

__all__ = ["CHECKPOINT_RULES", "CheckpointConfig"]


@dataclass
class CheckpointConfig:
    """Validates on construction: a `ConfigError` names the field, what was given and what is allowed.

    Directories may be given as `os.PathLike` and are kept as `str`; the type "None" is kept as `None`.
    """

    SECTION: ClassVar[str] = "checkpoint"

    # save
    save: str | None = setting(None, "Directory for persistent checkpoints (shared storage).", path=True)
    save_interval: int | None = setting(
        None,
        "A persistent checkpoint is due when the iteration is a multiple of this. Without it, the only one is made "
        "when the loop completes.",
        unit="iterations",
        limit=at_least(1),
    )
    save_optim: bool = setting(True, "Persistent checkpoints hold the optimizer's state.")
    save_rng: bool = setting(True, "Persistent checkpoints hold the states of the random number generators.")
    save_tokenizer_assets: bool = setting(
        True, "Persistent checkpoints hold the tokenizer's files, if a tokenizer was given."
    )
    async_save: bool = setting(
        False, "Persistent checkpoints are written in the background; training waits for the snapshot copy only."
    )

    # load
    load: str | None = setting(
        None,
        "Directory of a persistent checkpoint to start from (its base directory, not `iter_N`); considered while this "
        "run has no save of its own.",
        path=True,
    )
    load_optim: bool = setting(True, "Load the optimizer's state from a persistent checkpoint.")
    load_rng: bool = setting(True, "Load the random number generators' states from a persistent checkpoint.")
    load_main_params_from_ckpt: bool = setting(
        False, "Load the optimizer's main parameters from a persistent checkpoint, without the rest of its state."
    )
    ckpt_step: int | None = setting(
        None,
        "Load this iteration instead of the newest. The start is then a fork: later saves of earlier starts are "
        "abandoned.",
        unit="iteration",
        limit=at_least(0),
    )
    exit_on_missing_checkpoint: bool = setting(
        False, "Exit when there is no checkpoint to load, instead of training from the initial parameters."
    )
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = setting(
        "assume_ok_unexpected",
        "What happens when a persistent checkpoint and the training state have different keys. *Unexpected* keys are "
        "asked for and not in the checkpoint, *missing* ones are in it and not asked for (`all` means both). "
        "`assume_ok_` raises an error for unexpected keys and ignores missing ones; `log_` warns, `raise_` raises an "
        "error, `return_` gives the keys in `Resume`, `ignore_all` says nothing.",
    )

    # fine-tuning
    pretrained_checkpoint: str | None = setting(
        None, "Directory of a persistent checkpoint with the parameters that fine-tuning starts from.", path=True
    )

    # format and cost
    ckpt_format: Literal["torch_dist", "zarr", "fsdp_dtensor"] = setting(
        "torch_dist", "Format of persistent checkpoints."
    )
    fully_parallel_save: bool = setting(
        True,
        "Data-parallel ranks share the writing of what is replicated on them; otherwise the first one writes it, and "
        "every rank's snapshot (a `local` save, too) holds all of it.",
    )
    fully_parallel_load: bool = setting(
        False, "Data-parallel ranks share the reading of what is replicated on them and exchange it."
    )
    ckpt_assume_constant_structure: bool = setting(
        False,
        "Names, shapes and types stay as in the first save: its plan is used again, and ranks tell each other no more "
        "than a digest of theirs. A structure that changed all the same is planned afresh.",
    )

    # non-persistent
    non_persistent_save_interval: int | None = setting(
        None,
        "A non-persistent save is due when the iteration is a multiple of this.",
        unit="iterations",
        limit=at_least(1),
    )
    non_persistent_ckpt_type: Literal["global", "local", "in_memory", "None"] | None = setting(
        None,
        "Where non-persistent saves live: `local` on every node's own disk or shared-memory mount, `in_memory` in the "
        "node's memory, `global` on shared storage. `None`: there are none.",
    )
    non_persistent_global_ckpt_dir: str | None = setting(
        None, "Directory for `global` non-persistent saves; default: `non_persistent` in `save`.", path=True
    )
    non_persistent_local_ckpt_dir: str | None = setting(
        None, "Directory on every node for `local` saves; a shared-memory mount or a local disk.", path=True
    )
    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = setting(
        "fully_parallel",
        "`fully_parallel` splits what is replicated evenly over the data-parallel ranks; `atomic` stores everything on "
        "every rank.",
    )

    # replication
    replication: bool = setting(False, "Copy every rank's `local` or `in_memory` saves to other nodes.")
    replication_jump: int | None = setting(
        None,
        "Distance between the ranks that hold each other's copies; default: the ranks per node.",
        unit="ranks",
        limit=at_least(1),
    )
    replication_factor: int = setting(
        2, "How many nodes hold each rank's save, its own included.", unit="copies", limit=at_least(1)
    )

    # distributed optimizer
    dist_ckpt_optim_fully_reshardable: bool = setting(
        False,
        "Store a distributed optimizer's state in the parameters' own shapes, so that tensor, pipeline, expert and "
        "data parallel sizes may all change; else it lies in the optimizer's buckets, and only the data-parallel size "
        "may. `zarr` has no buckets: there it is always reshardable.",
    )
    distrib_optim_fully_reshardable_mem_efficient: bool = setting(
        False,
        "In Megatron Bridge: use less memory for that, by gathering one parameter at a time over gloo. Ours gathers "
        "nothing either way. Alone, without `dist_ckpt_optim_fully_reshardable`, it is warned of.",
    )

    def __post_init__(self) -> None:
        check_all(self, CHECKPOINT_RULES)


def _same_directory(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and os.path.abspath(one) == os.path.abspath(other)


CHECKPOINT_RULES: tuple[Rule, ...] = (
    Rule("async_save", "it needs a directory in save", lambda c: c.async_save and c.save is None),
    Rule(
        "async_save",
        'it needs ckpt_format="torch_dist"',
        lambda c: c.async_save and c.ckpt_format != "torch_dist",
    ),
    Rule(
        "ckpt_step",
        "it needs the directory that holds that iteration, in load",
        lambda c: c.ckpt_step is not None and c.load is None,
    ),
    Rule(
        "load_main_params_from_ckpt",
        "it needs load_optim=False: with the optimizer's state its main parameters come anyway",
        lambda c: c.load_main_params_from_ckpt and c.load_optim,
    ),
    Rule(
        "non_persistent_ckpt_type",
        "it needs non_persistent_save_interval, else nothing is ever saved",
        lambda c: c.non_persistent_ckpt_type is not None and c.non_persistent_save_interval is None,
    ),
    Rule(
        "non_persistent_save_interval",
        "it needs a non_persistent_ckpt_type (local, in_memory or global)",
        lambda c: c.non_persistent_save_interval is not None and c.non_persistent_ckpt_type is None,
    ),
    Rule(
        "non_persistent_ckpt_type",
        "local needs a directory in non_persistent_local_ckpt_dir",
        lambda c: c.non_persistent_ckpt_type == "local" and c.non_persistent_local_ckpt_dir is None,
    ),
    Rule(
        "non_persistent_ckpt_type",
        "global needs a directory in non_persistent_global_ckpt_dir or in save",
        lambda c: (
            c.non_persistent_ckpt_type == "global" and c.non_persistent_global_ckpt_dir is None and c.save is None
        ),
    ),
    Rule(
        "non_persistent_global_ckpt_dir",
        "it must not be save itself: both would write the same iter_N folders",
        lambda c: _same_directory(c.non_persistent_global_ckpt_dir, c.save),
    ),
    Rule(
        "replication",
        'it needs non_persistent_ckpt_type "local" or "in_memory": other saves are on shared storage',
        lambda c: c.replication and c.non_persistent_ckpt_type not in ("local", "in_memory"),
    ),
    Rule(
        "replication_factor",
        "replication needs at least 2, the own copy included",
        lambda c: c.replication and c.replication_factor < 2,
    ),
)
