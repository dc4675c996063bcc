#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0, CPU: functional.create_dynamic_map, the table that decodes the scales of a
# double-quantized 4-bit weight and is stored in checkpoints (nested_quant_map), is made with torch.linspace, whose last
# bits depend on the instruction set that torch uses: without AVX2 other entries come out than with it.
# Seen: torch without AVX2 and with it: 42 of 256 entries differ, by at most 2 units in the last place
# Tables written on one machine are therefore not bit for bit those of another, and neither is what they decode.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! grep -qw avx2 /proc/cpuinfo; then
    echo "this needs an x86 processor with AVX2" >&2
    exit 2
fi
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q bitsandbytes==0.50.2
for isa in default avx2; do
    ATEN_CPU_CAPABILITY=$isa "$work/venv/bin/python" -c "
import sys, bitsandbytes.functional as bnb
sys.stdout.write(' '.join(map(float.hex, bnb.create_dynamic_map().tolist())))" > "$work/$isa" 2> "$work/log" || {
        cat "$work/log" >&2
        exit 1
    }
done
"$work/venv/bin/python" - "$work/default" "$work/avx2" <<'PY'
import sys
import numpy as np

a, b = (np.array([float.fromhex(x) for x in open(path).read().split()], dtype=np.float32) for path in sys.argv[1:])
steps = np.abs(a.view(np.int32) - b.view(np.int32))
print(f"torch without AVX2 and with it: {int((a != b).sum())} of {a.size} entries differ, by at most "
      f"{int(steps.max())} units in the last place")
raise SystemExit(0 if (int((a != b).sum()), a.size, int(steps.max())) == (42, 256, 2) else 1)
PY
