"""A callback that protects a run of Hugging Face's `Trainer`: restored before its loop begins, saved between its steps.

    trainer = Trainer(model, arguments, train_dataset=data)
    protect(trainer, checkpoint=CheckpointConfig(...))
    trainer.train()

A step begins when all of the last one is done: its logging, its evaluation, its callbacks. So that is the boundary. The
Trainer has drawn the step's batches by then, in one process as in a restarted one, and random numbers are put back
behind that. Its own way to skip the batches of an epoch that were seen is used; nothing of its checkpoints is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError
from resilience.state import rng
from resilience.trainer import ResilientTrainer

__all__ = ["Protection", "protect"]

#: What is wrapped of a trainer; not documented by the library, and there from 5.3 on.
_WRAPPED = ("_inner_training_loop", "_prepare_for_training", "_run_epoch", "_load_rng_state", "_finalize_training")
#: What a run finds out about itself; the rest of `TrainerState` says how this start was configured.
_FOUND = (
    "epoch", "global_step", "log_history", "best_metric", "best_global_step", "best_model_checkpoint", "total_flos",
    "num_input_tokens_seen",
)  # fmt: skip
#: Sums since the last log, and over the run.
_SUMS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step", "current_flos")
_SEED = "initial_seed"
_RESUMED = "a protected save"  # the library asks whether there is a name, and skips batches if so


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "Transformers is not installed here.", advice="Install it: pip install torch-resilience[transformers]"
        ) from None
    return transformers


if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _library().TrainerCallback


def protect(
    trainer: Any,
    *,
    checkpoint: CheckpointConfig | None = None,
    resiliency: ResiliencyConfig | None = None,
    extra_state: Mapping[str, Any] | None = None,
) -> Protection:
    """Protect the next call of `trainer.train()`; before it, on every rank. Arguments as of `ResilientTrainer`.

    ConfigError for what would not go on as it began (DeepSpeed, an order of samples that nobody can repeat).
    """
    return Protection(trainer, checkpoint, resiliency, extra_state or {})


@dataclass
class _Place:
    """Optimizer steps begun in an epoch, of so many."""

    epoch: int = 0
    steps: int = 0
    of: int = 0


class Protection(_Callback):
    """One run's. Restoring and saving are collective, in the Trainer's own order of events."""

    def __init__(
        self,
        trainer: Any,
        checkpoint: CheckpointConfig | None,
        resiliency: ResiliencyConfig | None,
        extra_state: Mapping[str, Any],
    ) -> None:
        _refuse_what_would_not_go_on(trainer)
        self._trainer = trainer
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._extra = dict(extra_state)
        self._place = _Place()
        self._from: _Place | None = None  # where the epoch of the restart goes on
        self._sums: Mapping[str, Any] | None = None  # to be put back
        self._generators: dict[str, Any] | None = None
        self._sampler: Any = None  # the one that draws an epoch's order from a seed
        self._resilient: ResilientTrainer | None = None
        self._steps: Iterator[Any] | None = None
        for name in _WRAPPED:
            theirs = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(theirs)(functools.partial(getattr(self, name[1:]), theirs)))
        trainer.add_callback(self)

    @property
    def resilient(self) -> ResilientTrainer:
        """From the beginning of `train` on: `resumed_from`, `request_stop` and the rest. RuntimeError before."""
        if self._resilient is None:
            raise RuntimeError("train has not begun")
        return self._resilient

    # -- what the Trainer does, with ours around it -------------------------------------------------------------------

    def inner_training_loop(self, theirs: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if self._resilient is not None:
            raise ConfigError("protect is for one call of train.", advice="Make another trainer, and protect that.")
        failed = True
        try:
            result = theirs(*given, **named)
            failed = False
            return result
        except SystemExit:  # an orderly stop
            failed = False
            raise
        finally:
            self._close(failed)

    def _close(self, failed: bool) -> None:
        if self._resilient is not None:
            self._resilient.close(failed=failed)

    def prepare_for_training(self, theirs: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Model, optimizer and scheduler are made, and nothing has begun: elect and restore."""
        if named.get("resume_from_checkpoint") is not None or (len(given) > 2 and given[2] is not None):
            raise ConfigError(
                "resume_from_checkpoint is given, and a protected run resumes by itself.",
                advice="Leave it out; load weights to begin with into the model before.",
            )
        made = theirs(*given, **named)
        trainer, self._sampler = self._trainer, _seeded_sampler(made[1])
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # Accelerate's is around it
        self._resilient = resilient = ResilientTrainer(
            trainer.model_wrapped, optimizer, scheduler=trainer.lr_scheduler, scaler=trainer.accelerator.scaler,
            extra_state={**self._extra, "transformers": _Progress(self)}, checkpoint=self._checkpoint,
            resiliency=self._resiliency,
        )  # fmt: skip
        if self._from is not None:
            self._generators = rng.capture(self._devices())
        elif resilient.iteration:
            raise ConfigError(
                f"iteration {resilient.iteration} was resumed from a save that says nothing of a Trainer's place.",
                advice="To begin with the weights of another program, name it as pretrained_checkpoint.",
            )
        self._steps = resilient.iterations(sys.maxsize)
        return made

    def run_epoch(self, theirs: Callable[..., Any], **named: Any) -> Any:
        """Epochs that were trained are left out, and the batches of the one that was begun."""
        epoch, of, goes_on = named["epoch"], named["num_update_steps_per_epoch"], self._from
        if goes_on is None:
            self._place = _Place(epoch, 0, of)
        else:
            if goes_on.of != of:
                raise ConfigError(
                    f"an epoch had {goes_on.of} steps and has {of} now: the place in the data would be another.",
                    advice="Resume with the batch size, accumulation, number of ranks and data of the save.",
                )
            self._place = goes_on  # nothing may be left to do, and the last save still to be taken
            if epoch < goes_on.epoch or (epoch == goes_on.epoch and goes_on.steps >= of):
                return None
            self._place = _Place(epoch, goes_on.steps if epoch == goes_on.epoch else 0, of)
            self._from = None
            if goes_on.steps >= of:  # saved when the loop was over: of this epoch nothing had been drawn
                self._put_generators_back()
            named |= {
                "epochs_trained": epoch,
                "steps_trained_in_current_epoch": self._place.steps * self._trainer.args.gradient_accumulation_steps,
                "resume_from_checkpoint": _RESUMED,
            }
        return theirs(**named)

    def load_rng_state(self, theirs: Callable[..., Any], *given: Any, **named: Any) -> None:
        """Ours is put back when the step begins."""

    def finalize_training(self, theirs: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """The loop is over: the last step's boundary, the last save. Before the best weights may be put back."""
        self._steps = None
        self.resilient.complete()
        return theirs(*given, **named)

    # -- the Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self._sums is not None:
            for name in _SUMS:
                setattr(self._trainer, name, self._sums[name])
            self._trainer._tr_loss = self._sums["_tr_loss"].to(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """The boundary of the step before, if one was taken."""
        if self._steps is None:
            raise RuntimeError("a step begins outside of train")
        next(self._steps)
        self._place.steps += 1
        self._put_generators_back()

    def _put_generators_back(self) -> None:
        """Once, behind what a restart draws and the run had drawn."""
        if self._generators is not None:
            rng.restore(self._generators, self._devices())
            self._generators = None

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self._trainer.model.parameters()}

    # -- what is saved of it ------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        trainer, place = self._trainer, self._place
        sums = {name: getattr(trainer, name, 0) for name in _SUMS}
        loss = getattr(trainer, "_tr_loss", None)
        return {
            "place": [place.epoch, place.steps, place.of],
            "order": getattr(self._sampler, _SEED, None),
            "state": {name: getattr(trainer.state, name) for name in _FOUND},
            "sums": {**sums, "_tr_loss": torch.zeros(()) if loss is None else loss.detach()},
            "callbacks": {_name(each): each.state()["attributes"] for each in self._exportable()},
        }

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """In the middle of the restore, after the Trainer has made its state."""
        self._from, self._sums = _Place(*saved["place"]), saved["sums"]
        if self._sampler is not None and saved["order"] is not None:
            setattr(self._sampler, _SEED, saved["order"])
        for name in _FOUND:
            setattr(self._trainer.state, name, saved["state"][name])
        for each in self._exportable():
            for name, value in saved["callbacks"].get(_name(each), {}).items():
                setattr(each, name, value)

    def _exportable(self) -> list[Any]:
        """The callbacks that have a state, as the library knows them."""
        kind = sys.modules["transformers.trainer_callback"].ExportableState
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, kind)]


class _Progress:
    """Where the Trainer is, as `extra_state`."""

    def __init__(self, protection: Protection) -> None:
        self._protection = protection

    def state_dict(self) -> dict[str, Any]:
        return self._protection.progress()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._protection.go_on(saved)


def _seeded_sampler(loader: Any) -> Any:
    """Accelerate's, below whatever shares the batches out; None where the order is somebody else's."""
    inside, found = loader, None
    while inside is not None and found is None:
        found = next((each for each in (inside, getattr(inside, "sampler", None)) if hasattr(each, _SEED)), None)
        inside = getattr(inside, "batch_sampler", None)
    return found


def _name(callback: Any) -> str:
    return f"{type(callback).__module__}.{type(callback).__qualname__}"


def _refuse_what_would_not_go_on(trainer: Any) -> None:
    """What would train in silence as no unprotected run does, or go on somewhere else."""
    lacking = [name for name in _WRAPPED if not hasattr(trainer, name)]
    if lacking:
        raise ConfigError(
            f"a {type(trainer).__name__} of transformers {_library().__version__} has no {', '.join(lacking)}.",
            advice="Use a transformers.Trainer from 5.3 on.",
        )
    args = trainer.args
    for refused, what in (
        (trainer.is_deepspeed_enabled, "DeepSpeed keeps the optimizer's state in a form of its own"),
        (args.auto_find_batch_size, "auto_find_batch_size trains with one batch size after the other"),
        (args.ignore_data_skip, "ignore_data_skip begins the epoch anew at a restart"),
        (not args.accelerator_config.use_seedable_sampler, "without use_seedable_sampler no order can be drawn again"),
    ):
        if refused:
            raise ConfigError(f"{what}: a restart would not go on where the run was.", advice="Leave it out.")
