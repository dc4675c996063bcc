"""What a run measured: one JSON line per event, and the picture of its losses.

metrics.jsonl has a line {"event": "train", "step", "loss", ...} for every step and {"event": "valid", "step", "loss"}
for every validation. Lines are appended and flushed as they happen, so a killed run keeps what it had; on resume,
lines after the checkpoint's step are dropped, since those steps are done again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.files.folders import naming, new_file
from .trainer import StepReport


class MetricsLog:
    """Appends events to a metrics.jsonl.

    path: the file.  resume_at: keep events up to this step; 0 starts anew.
    """

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        kept = [e for e in read_metrics(path) if e["step"] <= resume_at] if resume_at and path.exists() else []
        with new_file(path) as building:
            building.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, event: str, **values: Any) -> None:
        """Writes one event."""
        with naming(self.path):
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def train_event(report: StepReport) -> dict[str, Any]:
    """The values of a step's "train" event."""
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss over steps into a PNG; the file appears whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = read_metrics(metrics)
    train = [(e["step"], e["loss"]) for e in events if e["event"] == "train" and not e.get("skipped")]
    valid = [(e["step"], e["loss"]) for e in events if e["event"] == "valid"]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#8fb3d9", linewidth=1, label="train, each step")
        axes.plot(*zip(*_smooth(train), strict=True), color="#1f5fa8", linewidth=2, label="train, smoothed")
    if valid:
        axes.plot(*zip(*valid, strict=True), color="#d1603d", marker="o", linewidth=1.5, label="valid")
    axes.set(xlabel="step", ylabel="loss (nats per label)", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or valid:
        axes.legend(frameon=False)
    with new_file(picture) as building:
        figure.savefig(building, format="png")
    plt.close(figure)


def _smooth(points: list[tuple[int, float]], *, weight: float = 0.8) -> list[tuple[int, float]]:
    """Exponential moving average, with its start corrected for having no past."""
    out, mean = [], 0.0
    for i, (step, loss) in enumerate(points, 1):
        mean = weight * mean + (1 - weight) * loss
        out.append((step, mean / (1 - weight**i)))
    return out
