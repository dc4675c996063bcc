"""A linear layer with a low-rank update beside it.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ         LoRA, arXiv:2106.09685, equation 3;  x̃ = dropout(x),  s = alpha / R

The base layer computes x Wᵀ + b itself (dense, 4-bit, anything callable that has `in_features` and
`out_features`) and is frozen. Only A [R, K] and B [N, R] are trained: A starts uniform in ±1/sqrt(K), B at
zero, so that a new adapter changes nothing. The update, its gradient by hand, and what is saved for the
backward are kernels/lora/ops.py.

*Precision.* A and B are float32, also over a bf16 or 4-bit base: an optimizer's step is often smaller than
half a bf16 ulp of the weight and would be rounded away. The products run in the dtype of the input, or in
autocast's. On a CPU a 16-bit product of few rows is slower than a float32 one (the overhead of the call and
the conversion of A and B cost more), so short inputs are computed in float32. The README has the measurement;
`compute_dtype` overrides this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.lora import add_lora
from .config import check_alpha, check_dropout, check_rank, scaling
from .errors import AdapterError

# Below this many rows a bf16 or fp16 branch on a CPU is computed in float32. The measured crossover is between
# 100 and 160 rows (K, N = 576..1536, R = 8, Intel Xeon with AVX512-BF16 and AMX); it is higher where bf16
# products are slower.
SHORT_INPUT = 128


class LoRALinear(nn.Module):
    """y = base(x) + s (dropout(x) Aᵀ) Bᵀ       s = alpha / R         (arXiv:2106.09685)

    base:          the layer to adapt; callable, with `in_features` K and `out_features` N. It is not changed.
    r, alpha:      rank and numerator of the scale; with `rslora` the scale is alpha / sqrt(R).
    dropout:       probability for the branch's input, in training mode only. The mask's seed comes from
                   torch's global CPU generator: `torch.manual_seed` makes a step reproducible, and activation
                   checkpointing, which restores that generator, recomputes the same mask.
    generator:     for A's initial values, drawn on the CPU: the same bits on every device.
    dtype:         of A and B; float32 unless the adapter is only to be applied.
    compute_dtype: of the branch's products; None picks (see the module's docstring).
    device:        of A and B; None means where the base's first parameter or buffer lives.
    Raises AdapterError: r, alpha or dropout is out of range, or `base` is not a linear layer.
    """

    lora_A: nn.Parameter  # [R, K]
    lora_B: nn.Parameter  # [N, R]

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_rank("r", r)
        check_alpha("alpha", alpha)
        check_dropout("dropout", dropout)
        if not is_linear(base):
            raise AdapterError(
                f"{type(base).__name__} cannot carry LoRA: want a layer with in_features and out_features"
            )
        self.base = base
        self.in_features, self.out_features = feature_counts(base)
        self.r, self.alpha, self.dropout, self.rslora = r, float(alpha), float(dropout), rslora
        self.scaling = scaling(r, alpha, rslora=rslora)
        self.compute_dtype = compute_dtype
        bound = self.in_features**-0.5  # kaiming_uniform_(a=sqrt(5)), as in the paper's code and PEFT
        device = device or _device_of(base)
        with torch.inference_mode(False):  # autograd keeps no tensor that was made in that mode
            A = torch.empty(r, self.in_features).uniform_(-bound, bound, generator=generator)
            self.lora_A = nn.Parameter(A.to(device, dtype))
            self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N], in the dtype that the base returns."""
        p = self.dropout if self.training else 0.0
        seed = int(torch.randint(2**63 - 1, ())) if p > 0 else 0
        return add_lora(
            self.base(x),
            x,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout=p,
            seed=seed,
            dtype=self.compute_dtype or _products_dtype(x),
        )

    def delta(self) -> Tensor:
        """The update s B A as one float32 (float64 if the parameters are) tensor [N, K]."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        return (B @ A).mul_(self.scaling)

    def extra_repr(self) -> str:
        """R, alpha and what else differs from the defaults."""
        extra = f", dropout={self.dropout}" if self.dropout else ""
        return f"r={self.r}, alpha={self.alpha:g}{extra}{', rslora' if self.rslora else ''}"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can be adapted: a linear layer by duck type that is not adapted already."""
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return not isinstance(module, LoRALinear) and all(isinstance(n, int) for n in features)


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight encoded: it then has `dequantize(dtype) -> [N, K]`."""
    return is_linear(module) and callable(getattr(module, "dequantize", None))


def feature_counts(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a layer for which `is_linear` holds."""
    k, n = module.in_features, module.out_features
    assert isinstance(k, int) and isinstance(n, int)
    return k, n


def _products_dtype(x: Tensor) -> torch.dtype:
    device, dtype = x.device.type, x.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    short = device == "cpu" and x.numel() < SHORT_INPUT * x.shape[-1]
    return torch.float32 if short and dtype in (torch.bfloat16, torch.float16) else dtype


def _device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
