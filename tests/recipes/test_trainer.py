"""The training loop: its loss against the plain formula, what may not change a gradient, and resuming to the bit."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qlorag.lora import LoRAConfig, attach, trainable_parameters
from qlorag.models import Decoder, load_model
from qlorag.recipes.cli.main import main
from qlorag.recipes.data.examples import Example
from qlorag.recipes.errors import TrainingError
from qlorag.recipes.hub.assemble import assemble
from qlorag.recipes.training.adapter import prepare, run_record
from qlorag.recipes.training.metrics import MetricsLog, plot_losses, read_metrics
from qlorag.recipes.training.objectives import SFT
from qlorag.recipes.training.objectives.packing import Batch, pack
from qlorag.recipes.training.observer import RunObserver, RunResult, RunStart
from qlorag.recipes.training.optimizers import AdamW, clip_gradients
from qlorag.recipes.training.run import TrainingRun
from qlorag.recipes.training.settings import TrainSettings
from qlorag.recipes.training.trainer import StepReport, Trainer, learning_rate, mean_loss, perplexity
from safetensors.torch import load_file

pytestmark = pytest.mark.isa


def example(seed: int, n: int, prompt: int) -> Example:
    ids = torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [False] * prompt + [True] * (n - prompt), seed)


EXAMPLES = [example(1, 12, 4), example(2, 31, 20), example(3, 7, 6), example(4, 18, 3), example(5, 25, 24)]


def adapted(
    folder: Path, *, quantize: str | None = None, dropout: float = 0.0, dtype: Any = torch.float32, r: int = 4
) -> Decoder:
    model = load_model(folder, quantize=quantize, dtype=dtype)
    attach(model, LoRAConfig(r=r, alpha=2 * r, dropout=dropout), seed=1)
    with torch.no_grad():  # B starts at zero, which would hide the gradient of A
        for name, p in trainable_parameters(model):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    return model


def gradients(model: Decoder, groups: list[list[Example]]) -> dict[str, torch.Tensor]:
    """Of the mean loss over all labels of all groups, each group packed alone."""
    batches = [pack(g) for g in groups]
    total = sum(len(b.labels) for b in batches)
    for _, p in trainable_parameters(model):
        p.grad = None
    for b in batches:
        (SFT().summed_loss(model, b) / total).backward()
    return {n: p.grad.clone() for n, p in trainable_parameters(model)}


def test_pack_by_hand() -> None:
    batch = pack([Example([5, 6, 7, 8], [False, False, True, True], 1), Example([9], [True], 2),
                  Example([1, 2, 3], [True, False, True], 3)])  # fmt: skip
    assert batch.ids.tolist() == [[5, 6, 7, 1, 2, *[0] * 11]]  # without each last token, rounded up to 16
    assert batch.lengths == [3, 2, 11] and batch.tokens == 5  # the example of one token predicts nothing
    assert batch.rows.tolist() == [1, 2, 4] and batch.labels.tolist() == [7, 8, 3]


def test_loss_is_the_plain_formula(tiny_dir: Path) -> None:
    model = adapted(tiny_dir, dtype=torch.float64)
    losses = []
    for e in EXAMPLES:
        logits = model(torch.tensor([e.ids]))[0]
        losses += [
            F.cross_entropy(logits[t], torch.tensor(e.ids[t + 1])) for t in range(len(e.ids) - 1) if e.mask[t + 1]
        ]
    assert mean_loss(model, EXAMPLES, batch_size=2) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_packing_and_accumulation_change_no_gradient(quantize: str | None, tiny_dir: Path) -> None:
    model = adapted(tiny_dir, quantize=quantize, dtype=torch.float64)
    whole = gradients(model, [EXAMPLES])
    assert all(g.abs().max() > 0 for g in whole.values())
    for groups in ([[e] for e in EXAMPLES], [EXAMPLES[:2], EXAMPLES[2:]], [EXAMPLES[::-1]]):
        for name, g in gradients(model, groups).items():
            torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-9)  # A and B are float32


def test_learning_rate_by_hand() -> None:
    s = TrainSettings(iters=10, warmup=0.2, learning_rate=1.0)
    assert [learning_rate(i, s) for i in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(6, s) == pytest.approx(0.5)
    assert 0 < learning_rate(9, s) < 0.05
    assert learning_rate(0, TrainSettings(iters=1, warmup=0.0, learning_rate=1.0)) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"iters": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": 2.0},
        {"clip": -1.0},
        {"optimizer": "sgd"},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=f"{next(iter(wrong))}=.*wanted"):
        TrainSettings(**wrong)


def test_training_learns_and_leaves_the_base_alone(tiny_dir: Path) -> None:
    model = adapted(tiny_dir, quantize="nf4")
    frozen = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    before = {
        n: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest() for n, t in frozen.items()
    }
    trainer = Trainer(model, EXAMPLES, TrainSettings(iters=40, batch_size=2, learning_rate=5e-3))
    first = mean_loss(model, EXAMPLES)
    for _ in range(40):
        trainer.take_step()
    assert mean_loss(model, EXAMPLES) < 0.7 * first
    after = {
        n: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest() for n, t in frozen.items()
    }
    assert before == after


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_reports_the_mean_over_all_its_labels(batch_size: int, accumulation: int, tiny_dir: Path) -> None:
    """However the four examples of a step are spread over micro-batches. They have 8, 11, 1 and 15 labels, so a mean
    of micro-batch means, a sum, or a division by one micro-batch's labels gives another loss and another gradient."""
    model = adapted(tiny_dir, dtype=torch.float64)
    whole, wanted = gradients(model, [EXAMPLES[:4]]), mean_loss(model, EXAMPLES[:4])
    settings = TrainSettings(batch_size=batch_size, grad_accumulation=accumulation, clip=0.0)
    trainer = Trainer(model, EXAMPLES[:4], settings)
    report = trainer.take_step()
    assert report.loss == pytest.approx(wanted, rel=1e-9)
    assert (report.trained_tokens, report.tokens) == (8 + 11 + 1 + 15, 11 + 30 + 6 + 17)
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in whole.values()))
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)  # A and B are float32, summed in another order
    for name, p in trainer.parameters.items():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-9)


def test_every_step_and_micro_batch_has_a_dropout_mask_of_its_own(tiny_dir: Path) -> None:
    """One example and a rate that float32 rounds away: nothing but the masks can make one step's loss another's."""

    def losses_of(dropout: float, *, seed: int = 0, accumulation: int = 1) -> list[float]:
        settings = TrainSettings(batch_size=1, grad_accumulation=accumulation, learning_rate=1e-30, seed=seed)
        trainer = Trainer(adapted(tiny_dir, dropout=dropout), EXAMPLES[1:2], settings)
        return [trainer.take_step().loss for _ in range(4)]

    assert len(set(losses_of(0.0))) == 1
    first = losses_of(0.5)
    assert len(set(first)) == 4
    assert losses_of(0.5) == first  # drawn from (seed, step)
    assert not set(losses_of(0.5, seed=1)) & set(first)  # and no step of one seed is a step of another
    # The first micro-batch has the masks of the step without accumulation; a second with the same would give its loss.
    assert not set(losses_of(0.5, accumulation=2)) & set(first)


# At rank 64 the tiny model's matrices have 4096 elements, from which on their moments are kept in 8 bits.
OPTIMIZERS = pytest.mark.parametrize(("optimizer", "rank"), [("adamw", 4), ("adamw8bit", 64)])


@OPTIMIZERS
def test_a_step_clips_decays_and_moves_at_the_scheduled_rate(optimizer: str, rank: int, tiny_dir: Path) -> None:
    """Adam's first step moves an element by lr g / (|g| + eps): by the rate itself, whatever the gradient, from which
    decay takes lr * decay * p more. Clipped to a norm of 1e-9, |g| lies below eps and the element hardly moves."""

    def after_a_step(**settings: float) -> tuple[dict[str, torch.Tensor], Trainer, Any]:
        trainer = Trainer(
            adapted(tiny_dir, r=rank), EXAMPLES, TrainSettings(iters=10, optimizer=optimizer, warmup=0.2, **settings)
        )
        began = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        report = trainer.take_step()
        return {name: p.detach() - began[name] for name, p in trainer.parameters.items()}, trainer, report

    moved, trainer, report = after_a_step(clip=0.0, learning_rate=1e-3)
    assert (report.learning_rate, report.skipped, trainer.optimizer.steps) == (5e-4, False, 1)  # the first of two warm
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in trainer.parameters.values()))
    assert report.grad_norm == pytest.approx(norm)
    for name, p in trainer.parameters.items():
        large = p.grad.abs() > 1e-5  # 1000 eps
        assert large.any()
        torch.testing.assert_close(moved[name][large], -5e-4 * p.grad.sign()[large], rtol=2e-3, atol=1e-8)
    decayed, _, _ = after_a_step(clip=0.0, learning_rate=1e-3, weight_decay=0.5)
    for name, p in adapted(tiny_dir, r=rank).named_parameters():
        if name in moved:
            torch.testing.assert_close(decayed[name] - moved[name], -5e-4 * 0.5 * p.detach(), rtol=1e-3, atol=1e-7)
    clipped, trainer, report = after_a_step(clip=1e-9, learning_rate=1e-3)
    assert report.grad_norm == pytest.approx(norm)  # as it was before
    assert math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in trainer.parameters.values())) == pytest.approx(
        1e-9, rel=1e-4
    )
    assert all(d.abs().max() < 1e-4 for d in clipped.values())


@OPTIMIZERS
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, rank: int, tiny_dir: Path) -> None:
    model = adapted(tiny_dir, r=rank)
    trainer = Trainer(model, EXAMPLES, TrainSettings(iters=9, batch_size=2, optimizer=optimizer))
    trainer.take_step()
    kept = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    moments = {n: t.clone() for n, t in trainer.optimizer.state_dict().items()}
    assert any(t.dtype == torch.uint8 for t in moments.values()) == (optimizer == "adamw8bit")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    report = trainer.take_step()
    assert report.skipped and math.isnan(report.loss)
    assert all(torch.equal(kept[n], p) for n, p in trainer.parameters.items())
    assert all(torch.equal(moments[n], t) for n, t in trainer.optimizer.state_dict().items())
    trainer.take_step()
    with pytest.raises(TrainingError, match=r"step 4: loss nan .* 3 times in a row \(last rows: lines"):
        trainer.take_step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    torch.manual_seed(0)
    ours = {"a": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(5))}
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours.values()]
    optimizer = AdamW(ours, weight_decay=decay)
    wanted = torch.optim.AdamW(theirs, lr=1.0, weight_decay=decay)
    for step in range(20):
        rate = 1e-2 / (step + 1)
        for group in wanted.param_groups:
            group["lr"] = rate
        for p, q in zip(ours.values(), theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step % 5 - 3)
            q.grad = p.grad.clone()
        norm = clip_gradients(ours, 0.5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-5)
        optimizer.step(rate)
        wanted.step()
        for p, q in zip(ours.values(), theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # the same formula, rounded in another order


def test_nothing_to_train(tiny_dir: Path) -> None:
    with pytest.raises(TrainingError, match="attach an adapter"):
        Trainer(load_model(tiny_dir), EXAMPLES, TrainSettings())
    with pytest.raises(TrainingError, match="no examples"):
        Trainer(adapted(tiny_dir), [], TrainSettings())
    with pytest.raises(TrainingError, match="no token of the given examples"):
        mean_loss(adapted(tiny_dir), [Example([1, 2], [True, False], 1)])


@dataclass(frozen=True)
class HalfOfSFT(SFT):
    """Another objective: half of each loss, and a term of its own for every example."""

    share: float = 0.5

    def summed_loss(self, model: Decoder, batch: Batch) -> torch.Tensor:
        return self.share * super().summed_loss(model, batch)

    def settings(self) -> dict[str, Any]:
        return {"share": self.share}


def test_a_run_minimises_the_objective_it_is_given_and_reports_to_its_observer(tiny_dir: Path, tmp_path: Path) -> None:
    """Without the command line: a loaded model, an objective, an observer."""
    seen: list[Any] = []

    class Seen(RunObserver):
        def started(self, start: RunStart) -> None:
            seen.append((start.step, start.iters, start.layers, start.examples, start.summary))

        def reported(self, report: StepReport) -> None:
            seen.append(report.step)

        def validated(self, step: int, loss: float) -> None:
            seen.append(("valid", step, loss))

        def ended(self, result: RunResult) -> None:
            seen.append(result)

    losses = {}
    for objective in (SFT(), HalfOfSFT()):
        seen.clear()
        base, lora = assemble(str(tiny_dir), dtype="float32"), LoRAConfig(r=2, num_layers=1)
        settings = TrainSettings(iters=3, batch_size=2)
        record = run_record(base, EXAMPLES, lora=lora, settings=settings, objective=objective)
        assert record.get("share") == (0.5 if isinstance(objective, HalfOfSFT) else None)
        prepared = prepare(base, lora, record, name="tiny")
        out = tmp_path / type(objective).__name__
        run = TrainingRun(prepared, EXAMPLES, EXAMPLES[:2], objective=objective, settings=settings, out=out)
        result = run.run(Seen(), report_every=2, evaluate_every=3, save_every=0, keep=1)
        labels = sum(e.labels for e in EXAMPLES)
        tokens = sum(len(e.ids) for e in EXAMPLES)
        assert seen[0] == (0, 3, 7, 5, f"{tokens} tokens of which {labels} labelled")
        assert [s for s in seen if isinstance(s, int)] == [2, 3]
        assert [s[:2] for s in seen if isinstance(s, tuple) and s[0] == "valid"] == [("valid", 0), ("valid", 3)]
        assert seen[-1] is result and result.stopped_by is None and result.checkpoint.name == "step-0000003"
        assert (out / "adapter_model.safetensors").exists()
        losses[type(objective)] = result.first_valid_loss
    assert losses[HalfOfSFT] == pytest.approx(losses[SFT] / 2)


def test_metrics_survive_a_cut_line_and_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.add("train", step=step, loss=5.0 / step)
    log.add("valid", step=5, loss=2.0)
    log.close()
    with path.open("a") as f:
        f.write('{"event": "train", "st')
    assert [e["step"] for e in read_metrics(path)] == [1, 2, 3, 4, 5, 5]
    resumed = MetricsLog(path, resume_at=3)
    resumed.add("train", step=4, loss=1.0)
    resumed.close()
    assert [(e["step"], e["loss"]) for e in read_metrics(path)][-2:] == [(3, 5.0 / 3), (4, 1.0)]
    plot_losses(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(0.0) == 1.0 and math.isfinite(perplexity(1e9))


ROWS = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(7)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (folder / "valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[:2]))
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[:2]))
    return folder


def train(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--model", str(model), "--data", str(data), "--adapter-path", str(out), "--quantize", "nf4",
            "--dtype", "float32", "--iters", "12", "--batch-size", "2", "--dropout", "0.1", "--save-every", "5",
            "--steps-per-eval", "6", *more]  # fmt: skip


def weights(folder: Path) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in load_file(folder / "adapter_model.safetensors").items()}


def losses(folder: Path) -> list[tuple[str, int, float]]:
    return [(e["event"], e["step"], e["loss"]) for e in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.slow
@OPTIMIZERS
def test_a_run_killed_and_resumed_ends_with_the_same_bits(
    optimizer: str, rank: int, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--optimizer", optimizer, "--rank", str(rank)]
    assert main(train(tiny_dir, data, tmp_path / "whole", *flags)) == 0
    cut = tmp_path / "cut"
    child = subprocess.Popen(
        [sys.executable, "-m", "qlorag.recipes.cli", *train(tiny_dir, data, cut, *flags)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "step-0000005").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert not (cut / "adapter_model.safetensors").exists(), "killed too late to test anything"
    moments = load_file(cut / "checkpoints" / "step-0000005" / "optimizer.safetensors").values()
    assert {t.dtype for t in moments} >= ({torch.uint8} if optimizer == "adamw8bit" else {torch.float32})
    assert main(train(tiny_dir, data, cut, "--resume", *flags)) == 0
    assert weights(cut) == weights(tmp_path / "whole")
    assert losses(cut) == losses(tmp_path / "whole")
    # A second run of the same command is the same too, and only the newest checkpoints stay.
    assert sorted(p.name for p in (cut / "checkpoints").iterdir() if p.name[0] != ".") == [
        "step-0000010",
        "step-0000012",
    ]


def test_resume_refuses_other_settings_and_start_refuses_to_overwrite(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(tiny_dir, data, out, "--resume")) == 1
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert main(train(tiny_dir, data, out)) == 0
    before = weights(out)
    capsys.readouterr()
    assert main(train(tiny_dir, data, out)) == 1
    assert "holds an earlier run" in capsys.readouterr().err
    assert main(train(tiny_dir, data, out, "--resume", "--seed", "4", "--learning-rate", "0.5")) == 1
    assert "was started with --" in capsys.readouterr().err
    (out / "run.json").unlink()  # as of a run before its flags were kept: the checkpoint itself says what differs
    assert main(train(tiny_dir, data, out, "--resume", "--seed", "4", "--learning-rate", "0.5")) == 1
    message = capsys.readouterr().err
    assert "learning_rate was 0.0002 and is 0.5" in message and "seed was 0 and is 4" in message
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace("It is 4.", "It is 5."))  # as many rows as before
    assert main(train(tiny_dir, data, out, "--resume")) == 1
    assert "data was '" in capsys.readouterr().err
    (data / "train.jsonl").write_text(rows)
    assert main(train(tiny_dir, data, out, "--resume", "--optimizer", "adamw8bit")) == 1
    assert "optimizer was 'adamw' and is 'adamw8bit'" in capsys.readouterr().err
    assert main(train(tiny_dir, data, out, "--resume", "--dtype", "bfloat16")) == 1
    assert "dtype was 'torch.float32' and is 'torch.bfloat16'" in capsys.readouterr().err
    assert weights(out) == before
    assert main(train(tiny_dir, data, out, "--overwrite", "--seed", "4")) == 0
    assert weights(out) != before


def test_what_the_flags_cannot_mean(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in (
        (["--targets", "lm_head"], "the output head cannot be adapted"),
        (["--seed", str(2**40)], f"seed={2**40}, wanted from 0 to"),
        (["--keep", "0"], "--keep 0: wanted at least 1"),
        (["--save-every", "-1"], "--save-every -1: wanted at least 0"),
    ):
        assert main(train(tiny_dir, data, tmp_path / "run", *flags)) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, status: int, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-m", "qlorag.recipes.cli", *train(tiny_dir, data, out, "--iters", "100000")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(number)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == status
    assert "To go on: the same command with --resume" in said
    steps = sorted((out / "checkpoints").glob("step-*"))
    assert json.loads((steps[-1] / "trainer.json").read_text())["step"] == int(steps[-1].name[5:])


def test_a_damaged_checkpoint_is_named(
    tiny_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train(tiny_dir, data, out)) == 0
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    good = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(good[: len(good) // 2])
    assert main(train(tiny_dir, data, out, "--resume", "--iters", "20")) == 1
    assert "optimizer.safetensors: cannot be read" in capsys.readouterr().err
    (newest / "trainer.json").write_text("{")
    assert main(train(tiny_dir, data, out, "--resume", "--iters", "20")) == 1
    assert "trainer.json: not a checkpoint's state" in capsys.readouterr().err
