"""The candidates' names in the results of bench_nf4.py; nf4/targets.py and summary.py read them.

A file of its own, so that reading results does not import torch.
"""

OURS = "qlorag"
DENSE = "torch, dense weight"
AS_DOCUMENTED = "bitsandbytes matmul_4bit"
REPACKED = "bitsandbytes, repacked for inference"

OURS_DECODE = "qlorag C, double-quantized, out="
KERNEL = "bitsandbytes C kernel, reused out"
PUBLIC = "bitsandbytes dequantize_4bit, as installed"
COPY = "copy of the same number of bytes"
