"""When a training's state goes to the disk: where a checkpoint is due, and where a round fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from diffalign.errors import InputError
from diffalign.loop import Row, Training
from diffalign.run import Run


@dataclass
class Saving:
    """The checkpoints of one training, the newest `keep` of them; the first process writes."""

    run: Run
    training: Training
    keep: int
    saved: int  # the step of the newest one

    def checkpoint(self) -> None:
        """Write one of now, which must be a boundary; every process must call."""
        state, accelerator, step = self.training.state(), self.training.accelerator, self.training.context.step
        if accelerator.is_main_process:
            self.run.save_checkpoint(step, state, self.keep)
        self.saved = step
        accelerator.wait_for_everyone()  # the launcher ends them all once one has stopped

    def lasting(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows. Where the next one fails, the state of the last boundary becomes a checkpoint, unless a step was taken since.

        Between two boundaries nothing else changes than what `Training.moving` copies, so the resumed run is the same as if nothing had
        failed. Of several processes the first one saves, if it is the one that fails; weights that are shared out would take all of them.
        """
        training = self.training
        moving = training.moving()
        while True:
            try:
                row = next(rows, None)
            except InputError as error:
                if not training.accelerator.is_main_process:
                    raise
                step = training.context.step
                if moving["step"] == step != self.saved and not training.sharded:
                    with suppress(InputError, OSError):  # the disk itself may be the trouble
                        self.run.save_checkpoint(step, training.state_with(moving), self.keep)
                        self.saved = step
                late = "" if self.saved == step else f", of {step}: steps were taken since, and the round's rest cannot be saved"
                raise InputError(f"{error}\nSaved at step {self.saved}{late}. Go on: diffalign train --resume {self.run.path}") from error
            if row is None:
                return
            yield row
            if row.boundary:
                moving = training.moving()
