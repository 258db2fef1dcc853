"""Which checkpoints a run keeps: the best, one per epoch, and the last few to resume from."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from handspun.config import TrainConfig
from handspun.display import logger
from handspun.files import to_json
from handspun.runs.model_card import license_of, model_card
from handspun.runs.output_dir import TrainedRun, write_record
from handspun.runs.record import RunRecord, record_json
from handspun.runs.replacing import drop_replaced
from handspun.runs.resume import BEST, ResumePoint, SavedState, checkpoints_in, resumable
from handspun.training.checkpoint import (
    TRAINING_STATE,
    WriteFiles,
    collect_state,
    link_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    write_state,
)
from handspun.training.distributed import Distributed
from handspun.training.loop import EpochEnd, Evaluation, Event, TrainingState


class CheckpointManager:
    """Saves checkpoints after the loop's events. All ranks call it alike; the first one writes."""

    def __init__(
        self,
        run: TrainedRun,
        config: TrainConfig,
        processes: Distributed,
        record: RunRecord | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock. record: the run's, on the first rank; it goes into what a run resumes from."""
        self._run, self._config, self._processes, self._record = run, config, processes, record
        self._clock = clock
        self._began = self._saved_at = clock()
        self._seconds_before = record.seconds or 0.0 if record else 0.0

    def restore(self, point: ResumePoint) -> None:
        """Restore what the run had when the checkpoint was saved."""
        run, state = self._run, point.state
        if self._processes.is_first:
            between = [path for path in resumable(run.output_dir) if path.name.startswith("checkpoint-step-")]
            run.step_checkpoints[:] = reversed(between)
        run.evaluations[:], run.incidents[:] = state.evaluations, state.incidents
        run.checkpoints[:] = [run.output_dir / name for name in state.checkpoints]
        run.best_checkpoint = self._best if state.best_checkpoint else None
        if self._processes.is_first:  # what the user has removed is not named any more
            run.checkpoints[:] = [path for path in run.checkpoints if path.exists()]
            run.best_checkpoint = self._best if state.best_checkpoint and self._best.exists() else None

    def on_event(self, event: Event, state: TrainingState) -> None:
        """Save checkpoint-best after the best evaluation so far, checkpoint-epoch-N after each epoch."""
        if isinstance(event, Evaluation):
            self._run.evaluations.append(event)
            if event.best and event.step:
                self._save(self._best, asdict(event))
                self._run.best_checkpoint = self._best
        elif isinstance(event, EpochEnd):
            self._save_epoch(event, state)
        else:
            return
        if self._record is not None:
            write_record(self._run, self._record, "running")

    def save_if_due(self, event: Event, state: TrainingState, *, must: bool = False) -> None:
        """Save checkpoint-step-N if it is due by steps or minutes, or because the run `must` end here.

        Called once everything that belongs to the step is done.
        """
        config, now = self._config, self._clock()
        minutes_over = bool(config.save_minutes) and now - self._saved_at >= 60 * config.save_minutes
        due = must or bool(config.save_steps and event.step % config.save_steps == 0)
        due = due or bool(self._processes.broadcast_scalar(minutes_over))  # clocks differ, and all must save alike
        if not due or event.step == 0 or isinstance(event, EpochEnd):
            return
        folder = self._run.output_dir / f"checkpoint-step-{event.step}"
        facts = {"step": event.step, "epoch": event.epoch}
        self._run.step_checkpoints.append(folder)
        self._save(folder, facts, self._training_state(event, state))
        self._saved(folder)
        if self._record is not None:
            write_record(self._run, self._record, "running")

    def cleanup(self) -> None:
        """Remove what was kept to resume from. Models stay."""
        if not self._processes.is_first:
            return
        for folder in resumable(self._run.output_dir):
            remove_checkpoint(folder / TRAINING_STATE)
        if not self._config.save_steps:
            for folder in checkpoints_in(self._run.output_dir):
                if folder.name.startswith("checkpoint-step-"):
                    remove_checkpoint(folder)
            self._run.step_checkpoints.clear()

    @property
    def _best(self) -> Path:
        return self._run.output_dir / BEST

    def _save_epoch(self, event: EpochEnd, state: TrainingState) -> None:
        run = self._run
        folder = run.output_dir / f"checkpoint-epoch-{event.epoch}"
        latest = run.evaluations[-1] if run.evaluations else None
        facts = {**asdict(event), "loss": latest.loss if latest else None}
        run.checkpoints.append(folder)
        training_state = self._training_state(event, state)
        if latest is None or not latest.best:
            self._save(folder, facts, training_state)
        elif self._processes.is_first:  # the evaluation at the end of this epoch has saved it
            link_checkpoint(self._best, folder, facts=facts, training_state=training_state)
        self._saved(folder)

    def _training_state(self, event: Event, state: TrainingState) -> WriteFiles:
        """Return what resuming after this step needs, collected on all ranks and written by the first."""
        run = self._run
        gathered = collect_state(state.model, state.optimizer, keep=self._processes.is_first)

        def write(folder: Path) -> None:
            assert self._record is not None
            saved = SavedState(
                step=event.step,
                skipped=state.skipped,
                losses=state.losses,
                max_tokens=state.max_tokens,
                evaluations=run.evaluations,
                incidents=run.incidents,
                checkpoints=[path.name for path in run.checkpoints],
                best_checkpoint=run.best_checkpoint is not None,
                run=replace(self._record, seconds=self.seconds),
            )
            write_state(folder, gathered, {**to_json(saved), "run": record_json(saved.run)})

        return write

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, including those before it was resumed."""
        return self._seconds_before + self._clock() - self._began

    def _save(self, folder: Path, facts: Mapping[str, object], training_state: WriteFiles | None = None) -> None:
        chat = self._run.model_in_memory
        assert chat is not None
        state = self._processes.state_to_save(chat.model)
        dtype = torch.bfloat16 if self._config.save_dtype == "bfloat16" else torch.float32
        if self._processes.is_first:
            save_checkpoint(
                chat,
                folder,
                dtype=dtype,
                facts=facts,
                card=self._card(facts),
                state=state,
                training_state=training_state,
            )

    def _card(self, facts: Mapping[str, object]) -> str:
        assert self._record is not None
        record = replace(self._record, evaluations=self._run.evaluations)
        return model_card(record, checkpoint=facts, license=license_of(self._config.model))

    def _saved(self, folder: Path) -> None:
        """Log that a checkpoint was saved, and delete the oldest ones to resume from."""
        self._saved_at = self._clock()
        logger.info(f"saved {folder}")
        if not self._processes.is_first:
            return
        drop_replaced(self._run.output_dir)
        for old in resumable(self._run.output_dir)[self._config.keep_last :]:
            if old in self._run.step_checkpoints:
                remove_checkpoint(old)
                self._run.step_checkpoints.remove(old)
            else:
                remove_checkpoint(old / TRAINING_STATE)
