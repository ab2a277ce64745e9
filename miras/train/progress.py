"""What a run writes and shows on its way: metrics.jsonl, a progress bar or plain lines, a stop where it is lost."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from miras.errors import Diverged
from miras.train import processes
from miras.train.checkpoints import how_to_resume
from miras.train.files import write_json

DIVERGED = "diverged.json"
"""In the folder of a run whose loss is no longer finite: at which step."""

WARM_STEPS = 5
"""The first steps of a process are slower (allocations, choice of kernels) and left out of its speed."""

LINES = 15
"""About so many plain lines a run."""


def say(text: str) -> None:
    """A line for the person who waits; a progress bar stays below it."""
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


def no_bars() -> None:
    """Keep transformers from drawing bars of its own for every file it reads or writes."""
    disable_progress_bar()


class Clock:
    """Seconds of training, without validation and saving.

    Args:
        before: seconds of the run before this process.
    """

    def __init__(self, before: float) -> None:
        self.seconds = before
        self.steps = 0
        self._before = before
        self._warm = (0, before)  # steps and seconds where the measurement of speed begins
        self._mark = time.perf_counter()

    def lap(self, counts: bool) -> None:
        """End a stretch of time; count it, or not."""
        now = time.perf_counter()
        self.seconds += now - self._mark if counts else 0.0
        self._mark = now

    def step(self) -> None:
        """End a step."""
        self.lap(counts=True)
        self.steps += 1
        if self.steps == WARM_STEPS:
            self._warm = (self.steps, self.seconds)

    def steps_per_second(self) -> float:
        """Without the first steps, where there are others."""
        start = self._warm if self.steps > WARM_STEPS else (0, self._before)
        return (self.steps - start[0]) / max(self.seconds - start[1], 1e-9)


class Reporter(TrainerCallback):
    """Writes every measurement as a line of JSON and shows where the run stands. A context: on leaving the bar is gone.

    Args:
        out: the run folder.
        steps: optimizer steps of the run.
        tokens: tokens of one step.
        bytes_per_token: of the training and the validation text.
        before: seconds of the run before this process.
    """

    def __init__(self, out: Path, steps: int, tokens: int, bytes_per_token: tuple[float, float], before: float) -> None:
        self.path, self.steps, self.tokens, self.bytes_per_token = out / "metrics.jsonl", steps, tokens, bytes_per_token
        self.out, self.clock = out, Clock(before)
        self.last_validation: dict[str, float] = {}
        self._said = -1
        console = Console(stderr=True)
        columns = (BarColumn(12), MofNCompleteColumn(), TextColumn("{task.description}"))
        shown = console.is_terminal and processes.is_main()
        self._bar = Progress(*columns, console=console, transient=True) if shown else None
        self._task = self._bar.add_task("", total=steps) if self._bar else None

    def __enter__(self) -> Reporter:
        """Show the bar, on a terminal."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away, whatever happened."""
        if self._bar is not None:
            self._bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The time until here was no training."""
        self.clock.lap(counts=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, and see to it that a resumed run logs the same losses: means since the last line."""
        self.clock.step()
        if control.should_save or control.should_evaluate:
            control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = False  # a longer validation follows

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write and show a line of training; validation and the Trainer's own summary come by other ways."""
        if logs is None or "loss" not in logs:
            return
        # Reading the loss has waited for the device, so this time belongs to the steps.
        self.clock.lap(counts=True)
        _check_finite(kwargs["model"], state.global_step, logs["loss"], logs.get("grad_norm", 0.0), self.out)
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "bits_per_byte": bits_per_byte(logs["loss"], self.bytes_per_token[0]),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": self.tokens * self.clock.steps_per_second(),
            "seconds": self.clock.seconds,
        }
        self._write(line)
        self._show(line)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say why the bar stands still."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description="validating")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write and show a validation."""
        loss = (metrics or {})["eval_loss"]
        bits = bits_per_byte(loss, self.bytes_per_token[1])
        self.last_validation = {"step": state.global_step, "val_loss": loss, "val_bits_per_byte": bits}
        self._write(self.last_validation)
        say(f"step {state.global_step:>{len(str(self.steps))}}/{self.steps}  validation {bits:.3f} bits/byte")
        self.clock.lap(counts=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The time of saving was no training."""
        self.clock.lap(counts=False)

    def _write(self, line: dict[str, Any]) -> None:
        if processes.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _show(self, line: dict[str, Any]) -> None:
        step, speed = line["step"], line["tokens_per_second"]
        left = (self.steps - step) * self.tokens / speed
        text = (
            f"loss {line['loss']:.3f}  {line['bits_per_byte']:.3f} bits/byte  {speed:,.0f} tokens/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        elif step * LINES // self.steps > self._said or step == self.steps:
            self._said = step * LINES // self.steps
            say(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}")


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A mean loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


def _check_finite(model: torch.nn.Module, step: int, loss: float, grad_norm: float, out: Path) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if processes.is_main():
        write_json(out / DIVERGED, {"step": step, "loss": str(loss), "grad_norm": str(grad_norm)})
    where = f"the first parameter that is no longer finite is {bad[0]}" if bad else "all parameters are still finite"
    raise Diverged(
        f"The training was lost by step {step}: loss {loss:g}, norm of the gradient {grad_norm:g}; {where}. "
        f"Try a smaller --learning-rate or a longer --warmup in a new --out. {how_to_resume(out)}"
    )
