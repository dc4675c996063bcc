"""A training run: the trainer, the folder that receives everything it makes, and the person who watches.

ADAPTER_PATH/
    adapter_config.json, adapter_model.safetensors   the finished adapter, as PEFT reads it
    metrics.jsonl, loss.png                          what was measured
    checkpoints/step-0000050/                        what `--resume` goes on from
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import TextColumn
from torch import nn

from ...lora import LoRAConfig, attach, load_adapter, save_adapter, trainable_parameters
from ...quant import QuantizedLinear
from ..cli.display import Display, count, size
from ..data.examples import Example
from ..errors import TrainingError
from ..hub.assemble import Assembled
from .checkpoint import checkpoints, read_state, restore_optimizer, save_checkpoint
from .metrics import MetricsLog, plot_losses, read_metrics
from .trainer import StepReport, Trainer, TrainSettings, mean_loss, perplexity


class TrainingRun:
    """One run: a model, its data, and the folder that receives everything."""

    def __init__(
        self,
        base: Assembled,
        examples: Sequence[Example],
        valid: Sequence[Example],
        *,
        lora: LoRAConfig,
        settings: TrainSettings,
        out: Path,
        name: str,
        resume_from: Path | None = None,
    ) -> None:
        self.base, self.valid, self.out, self.name, self.settings = base, valid, out, name, settings
        self.first_valid_loss: float | None = None
        self.result: dict[str, Any] = {}
        self._saved: tuple[int, Path] | None = None
        self.recorded = {
            **vars(settings),
            "lora": {k: v for k, v in vars(lora).items() if v not in ({}, ())},
            "quantize": base.quantize,
            "base": base.model.fingerprint,
            "dtype": str(base.model.model.embed_tokens.weight.dtype),
            "data": _digest(examples),
        }
        self.recorded = json.loads(json.dumps(self.recorded))  # as it will be read back: tuples become lists
        step = 0 if resume_from is None else read_state(resume_from, settings=self.recorded)
        if resume_from is None:
            self.adapted = attach(base.model, lora, seed=settings.seed)
            if "lm_head" in self.adapted:
                raise TrainingError(
                    "targets: the output head cannot be adapted, the loss is fused with it: leave it out"
                )
        else:
            info = load_adapter(base.model, resume_from, base_fingerprint=base.model.fingerprint, trainable=True)
            self.adapted = list(info.layers)
        self.trainer = Trainer(base.model, examples, settings)
        if resume_from is not None:
            restore_optimizer(self.trainer, resume_from, step=step)

    def go(self, display: Display, *, report: int, evaluate: int, save: int, keep: int) -> int:
        """Trains to the end, or until interrupted; returns the exit status.

        report, evaluate, save: steps between printed lines, validations and checkpoints; 0 for none.
        keep: newest checkpoints kept.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.trainer.step:
            _forget(self.out)
        trainer, valid_loss = self.trainer, None
        self._introduce(display)
        log = MetricsLog(self.out / "metrics.jsonl", resume_at=trainer.step)
        began, first, last = time.perf_counter(), trainer.step, None
        with _stop_signals() as stopped, _bar(display, self.settings.iters, trainer.step) as advance:
            if not trainer.step:
                valid_loss = self.first_valid_loss = self._validate(log, display)
            while trainer.step < self.settings.iters and not stopped:
                last = trainer.take_step()
                log.add("train", **_record(last))
                advance(last)
                at_end = last.step == self.settings.iters
                if report and (last.step % report == 0 or at_end or last.skipped):
                    display.say(_line(last))
                if evaluate and (last.step % evaluate == 0 or at_end):
                    valid_loss = self._validate(log, display)
                if save and last.step % save == 0 and not at_end:
                    self._checkpoint(keep)
        log.close()
        newest = self._checkpoint(keep)
        if not stopped:
            self.save_adapter(self.out)
        plot_losses(log.path, self.out / "loss.png")  # last, since nothing depends on it
        if stopped:
            display.say(
                f"stopped after step {trainer.step} of {self.settings.iters}; the adapter so far is in {newest}. "
                "To go on: the same command with --resume"
            )
            return 128 + stopped[0]
        seconds = time.perf_counter() - began
        result = {
            "adapter_path": str(self.out),
            "steps": trainer.step,
            "loss": None if last is None else last.loss,
            "valid_loss": valid_loss,
            "seconds": seconds,
            "tokens_per_second": None if last is None else self._rate(log.path, first),
            "peak_memory_bytes": None if last is None else last.peak_memory_bytes,
        }
        display.say(f"adapter in {self.out}, losses in {self.out / 'loss.png'}")
        self.result = result
        return 0

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter as PEFT reads it, with the base it was trained against."""
        save_adapter(
            self.base.model,
            folder,
            base_name=self.name,
            base_fingerprint=self.base.model.fingerprint,
            quantize=None if self.base.quantize is None else {"kind": self.base.quantize},
        )

    def _introduce(self, display: Display) -> None:
        model = self.base.model
        trainable = sum(p.numel() for _, p in trainable_parameters(model))
        total = parameter_count(model)
        held = f"{self.base.quantize} base" if self.base.quantize else "dense base"
        if self.trainer.step:
            display.say(f"going on after step {self.trainer.step}")
        display.say(
            f"{held}, {len(self.adapted)} layers adapted: {count(trainable)} of {count(total)} parameters trainable "
            f"({100 * trainable / total:.2f} %)"
        )
        tokens = sum(len(e.ids) for e in self.trainer.examples)
        trained = sum(sum(e.mask) for e in self.trainer.examples)
        display.say(
            f"{len(self.trainer.examples)} training examples, {tokens} tokens of which {trained} trained; "
            f"{len(self.valid)} validation examples"
        )

    def _validate(self, log: MetricsLog, display: Display) -> float | None:
        if not self.valid:
            return None
        loss = mean_loss(self.base.model, self.valid, batch_size=self.settings.batch_size)
        log.add("valid", step=self.trainer.step, loss=loss)
        display.say(f"step {self.trainer.step:5d}  valid loss {loss:.3f}  perplexity {perplexity(loss):.2f}")
        return loss

    def _checkpoint(self, keep: int) -> Path:
        """The checkpoint of this step, written unless it was a moment ago."""
        step = self.trainer.step
        if self._saved is None or self._saved[0] != step:
            self._saved = (
                step,
                save_checkpoint(
                    self.trainer, self.out, settings=self.recorded, save_adapter=self.save_adapter, keep=keep
                ),
            )
        return self._saved[1]

    @staticmethod
    def _rate(metrics: Path, first: int) -> float:
        steps = [e for e in read_metrics(metrics) if e["event"] == "train" and e["step"] > first]
        return float(sum(e["tokens"] for e in steps) / sum(e["seconds"] for e in steps))


def _digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained on, in order: a resumed run must see the same."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.ids, example.mask]).encode())
    return digest.hexdigest()


def _forget(out: Path) -> None:
    """Removes what an earlier run left, the adapter first: it must not be taken for the new run's."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png"):
        (out / name).unlink(missing_ok=True)
    for old in checkpoints(out):
        shutil.rmtree(old)


def parameter_count(model: nn.Module) -> int:
    """Logical parameters of a model, packed weights counted by their elements, a tied head once."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return packed + sum(p.numel() for p in model.parameters())


def _record(report: StepReport) -> dict[str, Any]:
    return {
        "step": report.step,
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "seconds": round(report.seconds, 4),
        "peak_memory_bytes": report.peak_memory_bytes,
        **({"skipped": True} if report.skipped else {}),
    }


def _line(r: StepReport) -> str:
    skipped = "  NOT APPLIED: loss or gradient is not finite" if r.skipped else ""
    return (
        f"step {r.step:5d}  loss {r.loss:.3f}  lr {r.learning_rate:.2e}  grad {r.grad_norm:.2f}  "
        f"{r.tokens_per_second:.0f} tok/s  peak {size(r.peak_memory_bytes)}{skipped}"
    )


@contextlib.contextmanager
def _bar(display: Display, total: int, done: int) -> Iterator[Callable[[StepReport], None]]:
    """A live bar with loss and speed on a terminal; elsewhere the printed lines have to do."""
    if not display.progress_console.is_terminal:
        yield lambda report: None
        return
    progress = display.progress(TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tok/s"))
    with progress:
        task = progress.add_task("training", total=total, completed=done, loss="-", rate="-")

        def advance(r: StepReport) -> None:
            progress.update(task, completed=r.step, loss=f"{r.loss:.3f}", rate=f"{r.tokens_per_second:.0f}")

        yield advance


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGINT or SIGTERM; a second one acts as usual.

    The loop looks at it between steps, so a checkpoint never holds half an update.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)
        for n, handler in previous.items():
            signal.signal(n, handler)

    with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere nobody presses ctrl-C
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
