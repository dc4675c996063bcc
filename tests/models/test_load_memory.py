"""Weights stream: while a model is quantized as it loads, memory holds the result and one tensor, little more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
from qlorag.models import Checkpoint, load_model
from qlorag.quant import QuantizedLinear

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("VmHWM")).split()[1])

before = peak()
model = load_model(sys.argv[1], quantize="nf4")
rise = peak() - before
packed = sum(m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
dense = sum(p.nbytes for p in model.parameters())
checkpoint = Checkpoint(sys.argv[1])
largest = max(checkpoint.nbytes(n) for n in checkpoint.names())
print(json.dumps({"rise": rise, "quantized": packed + dense, "largest": largest}))
"""


@pytest.mark.model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_peak_memory_of_a_quantized_load(smollm2_dir: Path) -> None:
    run = subprocess.run([sys.executable, "-c", CHILD, str(smollm2_dir)], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["rise"] < seen["quantized"] + seen["largest"] + 150e6, seen
    assert seen["quantized"] < 0.5 * 269e6  # of the bf16 file
