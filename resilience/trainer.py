"""The loop: batches out, boundaries in between, an end that is told apart from a failure.

    with ResilientTrainer(model, optimizer, dataloader=loader, checkpoint=...) as trainer:
        for batch in trainer.iterations(train_iters=10_000):
            ...

A snapshot is taken only between two steps: after the optimizer stepped and before the next batch is drawn, which is
when the loop asks for it. Leaving the loop otherwise (`break`, an exception) saves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.controller import ResiliencyController
from resilience.drill.rehearsal import Rehearsal
from resilience.errors import ConfigError, SaveFailedError, StoppedExit
from resilience.reports import Resume
from resilience.runtime.launcher_reports import Channel, LauncherReports, Unheard
from resilience.runtime.slurm import stop_time
from resilience.runtime.stuck import StuckWatch
from resilience.runtime.watchdog import Watchdog
from resilience.state.digest import state_digest
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.train_state import TrainState
from resilience.state.training_state import TrainingState

__all__ = ["ResilientTrainer"]


class ResilientTrainer:
    """Wraps a training loop: resumes at construction, saves at boundaries, ends in order.

    Every rank makes one, after `torch.distributed` is initialised (or without it, alone); the constructor,
    `iterations`, `fit` and `wait` are collective. Use it as a context manager, or call `close`; one that is still open
    when the process ends closes itself.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        dataloader: Any = None,
        extra_state: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        run_config: Mapping[str, Any] | None = None,
        layout: ParallelLayout | None = None,
        healthy: Callable[[], bool] | None = None,
        scaler: Any = None,
        checkpoint: CheckpointConfig | None = None,
        resiliency: ResiliencyConfig | None = None,
    ) -> None:
        """Elect the newest good save and load it, so that `iteration` and `resumed_from` are right from here on.

        Raises what `ResiliencyController.restore` raises, on all ranks alike.
        """
        self._state = TrainingState(
            model, optimizer, scheduler=scheduler, dataloader=dataloader, extra_state=extra_state, tokenizer=tokenizer,
            run_config=run_config, layout=layout, healthy=healthy, scaler=scaler,
        )  # fmt: skip
        self._has_loader = dataloader is not None
        self._stepped = False
        self._hooks = _watch_steps(optimizer, self._on_step)
        self._controller = ResiliencyController(self._state, checkpoint, resiliency)
        self._asked: list[str] = []
        self._finished = False
        self._watchdog: Watchdog | None = None
        self._reports: LauncherReports | None = None
        try:
            self._reports = self._make_reports()
            self._controller.before_save = self._reports.saving
            self._controller.close_at_exit = self.close
            with StuckWatch(self._controller.resiliency.exchange_timeout_s, self._controller.tell):
                self._controller.restore()
        except BaseException:
            self.close(failed=True)
            raise
        self._rehearsal = Rehearsal.from_environment(os.environ, self._controller.rank)
        self._controller.tells_every_step = self._rehearsal is not None
        self._watchdog = self._make_watchdog()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def iterations(self, train_iters: int) -> Iterator[Any]:
        """Yield batches until `train_iters` optimizer steps are finished, over all restarts.

        Without a data loader it yields the number of the iteration that begins (from 1). Asking for the next batch ends
        the step. After the last one, with `save` set, a persistent save is taken. Raises StoppedExit (a SystemExit)
        after a requested stop.
        """
        if type(train_iters) is not int or train_iters < 0:
            raise ConfigError(f"train_iters is {train_iters!r}; a whole number from 0 on is expected.")
        if self._rehearsal is not None and self._rehearsal.train_iters is not None:
            train_iters = self._rehearsal.train_iters
        if self._finished:
            raise RuntimeError("this trainer's loop is complete; make a new trainer to train on")
        watchdog, reports = self._watching(), self._reporting()
        self._stepped = False
        watchdog.beat()
        reports.step()
        try:
            while self.iteration < train_iters:
                try:
                    batch = self._state.loader.next_batch() if self._has_loader else self.iteration + 1
                except StopIteration:
                    watchdog.pause()
                    if not self._controller.leave():
                        return
                    break
                yield batch
                self._boundary(train_iters)
        finally:  # after a `break` too: no boundary is to come
            watchdog.rest()
        self._finish()

    @property
    def position_in_epoch(self) -> int:
        """How many batches of the data loader's epoch were drawn; 0 without a loader, and before the first batch."""
        return self._state.loader.position_in_epoch

    def fit(self, train_step: Callable[[Any], Any], train_iters: int) -> None:
        """Call `train_step(batch)` for each batch of `iterations(train_iters)`."""
        for batch in self.iterations(train_iters):
            train_step(batch)

    def complete(self) -> None:
        """The loop ended before `train_iters`, and that is all there was to do: as if they had been reached.

        Ends the step that is under way. Collective; instead of asking `iterations` for another batch. Nothing happens
        if the loop is complete already.
        """
        if self._finished:
            return
        try:
            self._boundary(self.iteration + 1)
        finally:
            self._watching().rest()
        self._finish()

    def _boundary(self, train_iters: int) -> None:
        """The loop asked for the next batch. No boundary if no optimizer stepped (gradient accumulation)."""
        if self._hooks and not self._stepped:
            return
        self._stepped = False
        iteration = self.iteration + 1
        watchdog = self._watching()
        watchdog.beat()
        while self._asked:  # a signal handler may ask at any moment
            self._controller.request(self._asked.pop(0))
        watchdog.pause()  # what follows has bounds of its own
        self._controller.after_step(iteration, last=iteration >= train_iters)
        watchdog.beat()
        self._reporting().step()
        if self._rehearsal is not None:
            self._rehearsal.act(iteration, settle=self._controller.wait_idle, tell=self._controller.tell)

    def _finish(self) -> None:
        watchdog = self._watching()
        watchdog.pause()  # what follows has bounds of its own
        self._reporting().saving()
        try:
            self._finished = True
            if self._rehearsal is not None:
                digest = state_digest(self._state.collect())
                self._controller.tell("digest", iteration=self.iteration, digest=digest)
            self._controller.finish()
        finally:
            watchdog.rest()
            self._reporting().close()

    # -- what users ask -----------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Finished optimizer steps, over all restarts."""
        return self._controller.iteration

    @property
    def train_state(self) -> TrainState:
        """The counters that are saved with the model; `consumed_train_samples` and the like are yours to count."""
        return self._state.train_state

    @property
    def resumed_from(self) -> Resume | None:
        """What this start goes on from; None for a fresh start."""
        return self._controller.resumed_from

    def save(self, kind: str = "persistent") -> None:
        """Ask for a save at the next boundary at which all ranks know. `kind`: "persistent" or "non_persistent"."""
        if kind not in ("persistent", "non_persistent"):
            raise ConfigError(f"kind is {kind!r}; 'persistent' or 'non_persistent' is expected.")
        config = self._controller.checkpoint
        if (config.save if kind == "persistent" else config.non_persistent_ckpt_type) is None:
            needed = "save" if kind == "persistent" else "non_persistent_ckpt_type"
            raise ConfigError(f"save({kind!r}) was asked for, but {needed} is not configured.")
        self._asked.append(kind)

    def request_save(self) -> None:
        """Ask for a save of the cheapest kind that is configured. Safe in a signal handler."""
        self._asked.append("save")

    def request_stop(self) -> None:
        """Ask for a save and an orderly end. Safe in a signal handler."""
        self._asked.append("stop")

    def wait(self) -> None:
        """Until requested and background saves are settled. Collective; between two steps."""
        self._controller.wait()

    def status(self) -> dict[str, Any]:
        """Where this rank stands; see `ResiliencyController.status`."""
        return self._controller.status()

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self, *, failed: bool = False) -> None:
        """End background work within a bound. Never collective, never saves. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        if self._reports is not None:
            self._reports.close()
        self._controller.close(failed=failed)

    def __enter__(self) -> ResilientTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        terminated = self._watchdog is not None and self._watchdog.terminated
        # after TERM a handler of the user's may exit: that is no orderly end, as nothing was saved
        failed = error is not None and not isinstance(error, StoppedExit if terminated else SystemExit)
        if failed and error is not None:
            self._controller.tell_exception(error)
            if self._watchdog is not None and self._watchdog.terminated and not isinstance(error, SaveFailedError):
                self._watchdog.exit_terminated()
        self.close(failed=failed)

    # -- small parts --------------------------------------------------------------------------------------------------

    def _on_step(self, *_: Any) -> None:
        self._stepped = True

    def _watching(self) -> Watchdog:
        if self._watchdog is None:
            raise RuntimeError("the trainer is closed")
        return self._watchdog

    def _reporting(self) -> LauncherReports:
        if self._reports is None:
            raise RuntimeError("the trainer is closed")
        return self._reports

    def _make_reports(self) -> LauncherReports:
        controller = self._controller
        channel: Channel = Unheard()
        if controller.resiliency.ft_launcher:
            from resilience.integrations.ft_launcher import channel_to_ft_launcher

            channel = channel_to_ft_launcher(os.environ, controller.tell)
        return LauncherReports(channel, controller.clock, controller.tell)

    def _make_watchdog(self) -> Watchdog:
        config = self._controller.resiliency
        watchdog = Watchdog(
            self._controller.clock,
            term_grace_s=config.term_grace_s,
            hang_timeout_s=config.hang_timeout_s,
            stop_at=stop_time(config.stop_before_s, os.environ) if self._controller.rank == 0 else None,
            request=self._controller.request,
            look=self._controller.asked_from_outside,
            tell=self._controller.tell,
        )
        watchdog.start()
        return watchdog


def _watch_steps(optimizer: Any, on_step: Callable[..., None]) -> list[Any]:
    """Hooks on every optimizer that has them: a boundary is where one stepped (gradient accumulation is not)."""
    optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return [each.register_step_post_hook(on_step) for each in optimizers if hasattr(each, "register_step_post_hook")]
