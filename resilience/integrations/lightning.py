"""A callback and a loader that protect a Lightning run: restored before it begins, saved at step boundaries.

    protection = Protection(checkpoint=CheckpointConfig(...))
    trainer = Trainer(callbacks=[protection], ...)
    trainer.fit(module, train_dataloaders=protection.loader(loader))

Lightning asks the loader for the next batch when all of the last step is done: its schedulers, its callbacks, its
validation. So that is the boundary, and `ResilientTrainer` draws the batches as in any other loop. Where Lightning's
own loops are is saved with each save, and put back before they begin: a run goes on in the middle of an epoch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError
from resilience.trainer import ResilientTrainer

__all__ = ["Protection"]

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _library() -> Any:
    """The one that the program uses; they are the same under two names."""
    used = [name for name in _NAMES if name in sys.modules]
    for name in (*used, *_NAMES):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigError("Lightning is not installed here.", advice="Install it: pip install torch-resilience[lightning]")


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _library().Callback


class Protection(_Callback):
    """One run's. Every rank makes one; restoring and saving are collective, in Lightning's own order of events."""

    def __init__(
        self,
        *,
        checkpoint: CheckpointConfig | None = None,
        resiliency: ResiliencyConfig | None = None,
        extra_state: Mapping[str, Any] | None = None,
    ) -> None:
        """As of `ResilientTrainer`; what Lightning itself keeps need not be given."""
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._extra = dict(extra_state or {})
        self._loader: _Epochs | None = None
        self._resilient: ResilientTrainer | None = None
        self._batches: Iterator[Any] | None = None

    @property
    def resilient(self) -> ResilientTrainer:
        """From the beginning of `fit` on: `resumed_from`, `request_stop` and the rest. RuntimeError before."""
        if self._resilient is None:
            raise RuntimeError("fit has not begun")
        return self._resilient

    def loader(self, loader: Any) -> _Epochs:
        """What to give to `fit` instead of `loader`, which needs a length and is drawn from by nobody else.

        Lightning gives it no sampler: in a distributed run give it a DistributedSampler. ConfigError without a length.
        """
        try:
            batches = len(loader)
        except TypeError:
            raise ConfigError(
                f"a {type(loader).__name__} has no length: Lightning would draw a batch ahead of the boundary.",
                advice="Use a map-style dataset, or a loader with __len__.",
            ) from None
        self._loader = _Epochs(self, loader, batches)
        return self._loader

    # -- Lightning's events -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Model and optimizers are made, and nothing has begun: elect and restore."""
        epochs = self._loader
        if epochs is None:
            raise ConfigError(
                "The training loader is not protected, so that its place would be lost.",
                advice="Give fit what Protection.loader(loader) returns.",
            )
        _refuse_what_would_not_go_on(trainer)
        schedulers = [each.scheduler for each in trainer.lr_scheduler_configs]
        self._resilient = ResilientTrainer(
            pl_module, list(trainer.optimizers), scheduler=schedulers or None, dataloader=epochs.source,
            extra_state={**self._extra, "lightning": _Loops(trainer)}, checkpoint=self._checkpoint,
            resiliency=self._resiliency,
        )  # fmt: skip
        self._batches = self._resilient.iterations(sys.maxsize)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """It came to its end, or Lightning's own rules ended it: the last step's boundary, the last save."""
        self._batches = None
        self.resilient.complete()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._resilient is not None:
            self._resilient.close(failed=not isinstance(exception, SystemExit))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._resilient is not None:
            self._resilient.close()

    def _next(self) -> Any:
        """The boundary of the step before, if one was taken, and the next batch."""
        if self._batches is None:
            raise RuntimeError("the loader is drawn from outside of fit")
        return next(self._batches)


def _refuse_what_would_not_go_on(trainer: Any) -> None:
    """What would train in silence as no unprotected run does, or go on somewhere else."""
    for name, usual in (
        ("overfit_batches", 0.0),  # which Lightning turns into the next as well
        ("limit_train_batches", 1.0),
        ("reload_dataloaders_every_n_epochs", 0),
    ):
        given = getattr(trainer, name, usual)
        if given != usual:
            raise ConfigError(
                f"{name} is {given!r}: an epoch would not be the loader's, whose place is what is saved.",
                advice="Leave it out, and give a loader of the data that are wanted.",
            )
    if len(trainer.optimizers) > 1:
        raise ConfigError(
            f"the module has {len(trainer.optimizers)} optimizers: Lightning counts a step of each, and a boundary is "
            "one for all.",
            advice="Use ResilientTrainer in a loop of your own.",
        )
    if trainer.ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path is {trainer.ckpt_path!r}, and a protected run resumes by itself.",
            advice="Leave it out; load weights to begin with into the module before fit.",
        )


class _Epochs:
    """The protected loader as Lightning sees it: what is left of an epoch, then whole ones."""

    def __init__(self, protection: Protection, source: Any, batches: int) -> None:
        self.source = source
        self._protection = protection
        self._batches = batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        seen = self._protection.resilient.position_in_epoch % self._batches
        for _ in range(self._batches - seen):
            yield self._protection._next()


class _Loops:
    """Where Lightning's loops are, and what its callbacks and its precision plugin keep."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        callbacks = {each.state_key: each.state_dict() for each in trainer.callbacks}
        return {
            "fit_loop": trainer.fit_loop.state_dict(),
            "callbacks": {key: state for key, state in callbacks.items() if state},
            "precision": trainer.precision_plugin.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        trainer = self._trainer
        loops = dict(saved["fit_loop"])
        entry = loops.get("epoch_loop.state_dict")
        if entry and entry.get("_batches_that_stepped"):
            # a restart counts the step before it once more, since Lightning saves before it has counted it
            loops["epoch_loop.state_dict"] = {**entry, "_batches_that_stepped": entry["_batches_that_stepped"] - 1}
        trainer.fit_loop.load_state_dict(loops)
        for each in trainer.callbacks:
            if each.state_key in saved["callbacks"]:
                each.load_state_dict(saved["callbacks"][each.state_key])
        trainer.precision_plugin.load_state_dict(saved["precision"])
