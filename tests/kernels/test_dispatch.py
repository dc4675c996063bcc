"""The rule that chooses between Triton and torch, and what it says about this machine."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from qlorag.kernels import dispatch, nf4
from qlorag.kernels.cross_entropy import linear_cross_entropy
from qlorag.kernels.lora import add_lora
from qlorag.kernels.rms_norm import rms_norm
from qlorag.kernels.rope import rope
from qlorag.kernels.swiglu import swiglu
from torch import Tensor

pytestmark = pytest.mark.isa

KERNELS = Path(__file__).parents[2] / "kernels"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and Triton, as far as questions go; another without is what most tests run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: None)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_what_runs_on_a_gpu(gpu: None) -> None:
    assert dispatch.available_backends("rope") == [
        ("rope", "triton", True, "on tensors of the GPU"),
        ("rope", "torch", True, "plain torch, any device"),
    ]


def test_why_triton_does_not_run_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported() -> str | None:
        raise AssertionError("asked for Triton where there is nothing to run it on")

    monkeypatch.setattr(dispatch, "why_no_triton", imported)
    triton, plain = dispatch.available_backends("rope")
    assert triton == ("rope", "triton", False, "no GPU: torch.cuda.is_available() is False")
    assert plain.available


def test_why_triton_does_not_run_where_it_is_not_installed(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_no_triton", lambda: "triton does not import: No module named 'triton'")
    triton, _ = dispatch.available_backends("rope")
    assert triton == ("rope", "triton", False, "triton does not import: No module named 'triton'")


def test_what_is_listed_is_what_can_be_named(no_gpu: None) -> None:
    assert tuple(status.backend for status in dispatch.available_backends("rope")) == dispatch.BACKENDS
    x = torch.zeros(2)
    for status in dispatch.available_backends("rope"):
        if status.available:
            assert dispatch.choose_backend(x, status.backend) == status.backend
        else:
            with pytest.raises(ValueError, match=f"backend='{status.backend}' cannot run"):
                dispatch.choose_backend(x, status.backend)
    assert dispatch.choose_backend(x, None) == "torch"
    with pytest.raises(ValueError, match="backend='cuda' does not exist: there are triton, torch"):
        dispatch.choose_backend(x, "cuda")


def test_every_operation_follows_this_rule_or_lists_its_own() -> None:
    """`available_backends` names triton and torch for these operations, so each must choose by this rule."""
    for folder in (path.parent for path in KERNELS.glob("*/reference.py")):
        ops = importlib.import_module(f"qlorag.kernels.{folder.name}.ops")
        if folder.name == "nf4":
            listed = {(status.operation, status.backend) for status in nf4.available_backends()}
            operations = ("nf4.quantize", "nf4.dequantize", "nf4.matmul", "nf4.matmul_backward")
            assert listed == {(name, backend) for name in operations for backend in ("triton", "c", "reference")}
        else:
            assert ops.choose_backend is dispatch.choose_backend, folder.name


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        (CPU, torch.float32, "the tensors are on cpu, and it runs on a GPU"),
        (CUDA, torch.float64, "dtype=torch.float64, and it takes float32, float16 or bfloat16"),
        (CUDA, torch.bfloat16, None),
    ],
)
def test_why_not_triton(
    device: torch.device, dtype: torch.dtype, why: str | None, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    got = dispatch.why_not_triton(device, dtype)
    assert got is None if why is None else got is not None and got.startswith(why)


def test_an_obstacle_is_asked_for_only_where_triton_could_run(no_gpu: None) -> None:
    asked: list[int] = []

    def obstacle() -> str | None:
        asked.append(1)
        return "rows are too long"

    x: Tensor = torch.zeros(2)
    assert dispatch.choose_backend(x, None, obstacle=obstacle) == "torch"
    assert dispatch.choose_backend(x, "torch", obstacle=obstacle) == "torch"
    assert not asked


def test_tensors_on_two_devices_are_named() -> None:
    dispatch.check_together(x=torch.zeros(1), y=torch.zeros(2))
    with pytest.raises(ValueError, match="y is on meta, x on cpu: move them together"):
        dispatch.check_together(x=torch.zeros(1), y=torch.zeros(2, device="meta"))


def test_whole_numbers_are_refused_by_every_operation() -> None:
    whole, floats = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^x is torch.int64: wanted float32, float16, bfloat16 or float64$"):
        rms_norm(whole, torch.ones(4), eps=1e-6)
    with pytest.raises(ValueError, match=r"^weight is torch.int64: wanted"):
        rms_norm(floats, torch.ones(4, dtype=torch.int64), eps=1e-6)
    with pytest.raises(ValueError, match=r"^cos is torch.int64: wanted"):
        rope(floats, whole, whole)
    with pytest.raises(ValueError, match=r"^gate is torch.complex64: wanted"):
        swiglu(floats.to(torch.complex64), floats.to(torch.complex64))
    with pytest.raises(ValueError, match=r"^lora_A is torch.int64: wanted"):
        add_lora(floats, floats, whole, torch.ones(4, 2), scaling=1.0)
    with pytest.raises(ValueError, match=r"^hidden is torch.int64: wanted"):
        linear_cross_entropy(whole, whole, torch.zeros(2, dtype=torch.int64))


def test_numbers_that_are_none_are_refused() -> None:
    x, w = torch.ones(2, 4), torch.ones(4)
    for eps in (None, "1e-6", -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^eps=.*, wanted a number from 0$"):
            rms_norm(x, w, eps=eps)  # type: ignore[arg-type]
    for scaling in (None, "2", math.nan):
        with pytest.raises(ValueError, match=r"^scaling=.*, wanted a finite number$"):
            add_lora(x, x, torch.ones(3, 4), torch.ones(4, 3), scaling=scaling)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^x is torch.float8_e4m3fn: wanted float32, float16, bfloat16 or float64$"):
        rms_norm(x.to(torch.float8_e4m3fn), w, eps=1e-6)
    with pytest.raises(ValueError, match="labels are on meta, where tensors have no values"):
        linear_cross_entropy(x.to("meta"), x.to("meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
