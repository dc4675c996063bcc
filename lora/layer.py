"""A linear layer with a low-rank update beside it, and the gradient of that update by hand.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ         LoRA, arXiv:2106.09685, equation 3;  x̃ = dropout(x),  s = alpha / R

The base layer computes x Wᵀ + b itself (dense, 4-bit, anything callable that has `in_features` and
`out_features`) and is frozen. Only A [R, K] and B [N, R] are trained: A starts uniform in ±1/sqrt(K), B at
zero, so that a new adapter changes nothing.

Three decisions:

*Two thin products, never B A.* x̃ Aᵀ and then Bᵀ cost T R (K + N) multiplications; forming B A would cost
N R K and then a second full layer. The second product is accumulated onto a copy of the base's output, which
saves one [T, N] tensor and, in bf16, one rounding.

*What is saved for backward.* x in its own dtype, which dA needs (q, k and v share one x); A and B; and
h = s x̃ Aᵀ [T, R], R/K of the size of x, about a percent, which saves the backward one reading of x. The
dropout mask is not saved: it is drawn again from its seed.

*Precision.* A and B are float32, also over a bf16 or 4-bit base: an optimizer's step is often smaller than
half a bf16 ulp of the weight and would be rounded away. The products run in the dtype of the input. On a CPU
a 16-bit product of few rows is slower than a float32 one (the overhead of the call and the conversion of A
and B cost more), so short inputs are computed in float32. The README has the measurement; `compute_dtype`
overrides this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .config import check_alpha, check_dropout, check_rank, scaling
from .errors import AdapterError

# Below this many rows a bf16 or fp16 branch on a CPU is computed in float32. The measured crossover is between
# 100 and 160 rows (K, N = 576..1536, R = 8, Intel Xeon with AVX512-BF16 and AMX); it is higher where bf16
# products are slower.
SHORT_INPUT = 128


class LoRABranch(torch.autograd.Function):
    """y = y0 + s (x̃ Aᵀ) Bᵀ with its gradient; y0 is the base layer's output."""

    # x̃  = m ⊙ x / (1 - p)              m is 0 or 1, drawn from a seed; without dropout x̃ = x
    # y  = y0 + s (x̃ Aᵀ) Bᵀ            s = alpha / R
    #
    # dy0 = dy
    # dx  = m / (1 - p) ⊙ s (dy B) A    [T,N]@[N,R]@[R,K]     (the base adds its own dy W)
    # dA  = s (dy B)ᵀ x̃                 [R,T]@[T,K]
    # dB  = s dyᵀ (x̃ Aᵀ)                [N,T]@[T,R]
    #
    # 1 / (1 - p) is a number, so it joins s: the code has x̃ = m ⊙ x and s / (1 - p).

    @staticmethod
    def forward(
        ctx: Any,
        y0: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        s: float,
        p: float,
        seed: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """y0 [..., N], x [..., K] -> y [..., N]; products run in `dtype`, p and seed make the mask."""
        mask, s = _mask(x, p, seed, s)
        h = F.linear(_rows(_dropped(x, mask), dtype), A.to(dtype)).mul_(s)  # [T, R]
        ctx.save_for_backward(x, A, B, h)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        # The sum is taken in the wider of the two dtypes, then rounded once to the base's.
        wide = torch.promote_types(y0.dtype, dtype)
        y = _rows(y0, wide, copy=True).addmm_(h.to(wide), B.to(wide).t())  # [T, N]
        return y.to(y0.dtype).view(y0.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [..., N] -> (dy0, dx, dA, dB), each only if asked for."""
        x, A, B, h = ctx.saved_tensors
        need_y0, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        dtype = h.dtype
        mask, _ = _mask(x, ctx.p, ctx.seed, 1.0)
        d = _rows(dy, dtype)
        dx = dA = dB = None
        if need_x or need_A:
            g = torch.mm(d, B.to(dtype)).mul_(ctx.s)  # s (dy B)  [T, R]
        if need_x:
            dx = _dropped(torch.mm(g, A.to(dtype)).to(x.dtype).view(x.shape), mask)  # [..., K]
        if need_A:
            dA = torch.mm(g.t(), _rows(_dropped(x, mask), dtype)).to(A.dtype)  # [R, K]
        if need_B:
            dB = torch.mm(d.t(), h).to(B.dtype)  # [N, R]
        return dy if need_y0 else None, dx, dA, dB, None, None, None, None


def _rows(x: Tensor, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """[..., K] -> [T, K] in `dtype`; a view where that is possible, unless a copy is asked for."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format) if copy else rows.to(dtype)


def _mask(x: Tensor, p: float, seed: int, s: float) -> tuple[Tensor | None, float]:
    """The mask (bool, x's shape; True is kept, None if all are) and s / (1 - p), which keeps E[x̃] = x.

    Each element is decided by 16 random bits, four elements to a 64-bit draw: a quarter of the time of
    `bernoulli_`, which would cost a CPU more than the layer itself. p is thereby rounded to a multiple of
    2^-16, and the scale uses the rounded value, so that E[x̃] = x holds exactly.
    """
    dropped = round(p * 65536)
    if dropped == 0:
        return None, s
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits.random_(-(2**63), None, generator=generator)
    uniform = bits.view(torch.int16)[: x.numel()]  # -32768 ... 32767
    return (uniform >= dropped - 32768).view(x.shape), s * 65536 / (65536 - dropped)


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


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
        A = torch.empty(r, self.in_features).uniform_(-bound, bound, generator=generator)
        device = device or _device_of(base)
        self.lora_A = nn.Parameter(A.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N], in the dtype that the base returns."""
        p = self.dropout if self.training else 0.0
        seed = int(torch.randint(2**63 - 1, ())) if p > 0 else 0
        dtype = self.compute_dtype or _branch_dtype(x)
        y: Tensor = LoRABranch.apply(  # type: ignore[no-untyped-call]
            self.base(x), x, self.lora_A, self.lora_B, self.scaling, p, seed, dtype
        )
        return y

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


def _branch_dtype(x: Tensor) -> torch.dtype:
    short = x.device.type == "cpu" and x.numel() < SHORT_INPUT * x.shape[-1]
    return torch.float32 if short and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
