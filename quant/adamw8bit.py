"""AdamW whose two moments are stored in 8 bits: 2.03 bytes of state per parameter instead of 8.   (arXiv:2110.02861)

    m, v = decoded from 8-bit blocks                      one parameter at a time, in float32
    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g²
    p = p - lr · wd · p
    p = p - lr · m̂ / (√v̂ + eps)                           m̂ = m / (1 - b1^t),  v̂ = v / (1 - b2^t)
    m, v -> 8-bit blocks                                  m over the signed map, v over the unsigned one

The update is AdamW's (arXiv:1711.05101, algorithm 2) and sees this step's moments as computed, before they are
rounded; what is rounded is what later steps remember of them. dynamic8bit.py has the format: blocks of 256 codes with
one float32 scale each, 8.125 bits a number. Between steps nothing else is kept. During a step, float32 copies of the
moments exist for one parameter at a time, so the peak grows by the largest parameter, not by all of them.

Small parameters keep float32 moments, below 4096 elements as in bitsandbytes: biases, norms, and the narrow matrices
of an adapter have little to save. At rank 8 on all linear layers of SmolLM2-135M they are 4 % of the parameters, and
the state comes to 2.26 bytes per parameter.

One code is not the nearest: v does without the code of zero. A v under 1.6e-7 of the largest in its block would get it
while its m, which goes with √v, does not; a later step with a small gradient then divides that m by little more than
eps, and throws the weight far off. The least positive code makes the step too small instead. After 20 steps of the
demo's training this concerns one v in 2000; with them rounded to zero, as the nearest code has it, one weight had moved
by 0.079 where AdamW moved none by more than 0.0023.

Left out: percentile clipping; paged state; 32-bit state for embeddings, which the paper asks for (no adapter here
trains one); and a fused kernel: this is plain torch, on any device. An update takes some six times as long as
with 32-bit moments, which is noticed beside steps of few tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..kernels.nf4 import QuantizationError
from .dynamic8bit import dequantize8, quantize8

MIN_8BIT_SIZE = 4096  # elements; bitsandbytes' default
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SIGNED = {"m": True, "v": False}


class AdamW8bit:
    """Updates named parameters in place. To use as `recipes.adamw.AdamW`: same arguments, same methods.

    min_8bit_size: parameters with fewer elements keep float32 moments.
    Attributes: `steps`, how many updates were made; `m`, `v`, {name: uint8 codes, or float32 if small, of the
        parameter's shape}; `m_absmax`, `v_absmax`, {name: float32 [ceil(numel / 256)]} of those in 8 bits. A resumed
        run needs these five.
    Raises QuantizationError: a parameter is not float32, bfloat16 or float16, or a number is out of its range.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        if not isinstance(parameters, Mapping):
            raise QuantizationError(f"parameters is a {type(parameters).__name__}: wanted {{name: parameter}}")
        _check("betas", betas[0], below=1.0)
        _check("betas", betas[1], below=1.0)
        _check("eps", eps)
        _check("weight_decay", weight_decay)
        self.parameters = dict(parameters)
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.m_absmax: dict[str, Tensor] = {}
        self.v_absmax: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            if p.dtype not in _FLOATS:
                raise QuantizationError(f"{name} is {p.dtype}: wanted float32, bfloat16 or float16")
            for kind, signed in _SIGNED.items():
                zeros = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
                if p.numel() < min_8bit_size:
                    getattr(self, kind)[name] = zeros
                else:
                    getattr(self, kind)[name], getattr(self, f"{kind}_absmax")[name] = quantize8(zeros, signed=signed)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient. lr: this step's learning rate.

        Gradients are taken as they are, as in the 32-bit form: the caller throws a step away whose gradient is not
        finite (`recipes.adamw.clip_gradients` tells). One NaN would spoil its whole block of 256 for good.
        Raises QuantizationError: a gradient is sparse, or lr no finite number from 0; nothing was updated.
        """
        _check("lr", lr)
        for name, p in self.parameters.items():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise QuantizationError(f"{name}.grad is {p.grad.layout}: wanted a dense one; use sparse=False")
        self.steps += 1
        b1, b2 = self.betas
        unbias_m, unbias_v = 1 - b1**self.steps, 1 - b2**self.steps
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            g, m, v = p.grad.float(), self._read("m", name), self._read("v", name)
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            self._write("m", name, m)
            self._write("v", name, v)
            if self.weight_decay:
                p.mul_(1 - lr * self.weight_decay)
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(unbias_v)).add_(self.eps), value=-lr / unbias_m)

    def _read(self, kind: str, name: str) -> Tensor:
        """A moment in float32: decoded, or the stored tensor itself if it is small."""
        stored: Tensor = getattr(self, kind)[name]
        absmax: Mapping[str, Tensor] = getattr(self, f"{kind}_absmax")
        return dequantize8(stored, absmax[name], signed=_SIGNED[kind]) if name in absmax else stored

    def _write(self, kind: str, name: str, x: Tensor) -> None:
        absmax = getattr(self, f"{kind}_absmax")
        if name not in absmax:
            return  # `x` is the stored tensor
        codes, scales = quantize8(x, signed=_SIGNED[kind])
        if kind == "v":
            codes.clamp_(min=1)  # not zero; in a block of zeros absmax is 0, and so is what is read back
        getattr(self, kind)[name].copy_(codes)
        absmax[name].copy_(scales)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for p in self.parameters.values():
            p.grad = None

    @property
    def nbytes(self) -> int:
        """All stored state; the maps are shared by all optimizers and not counted."""
        return sum(t.nbytes for t in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """The moments as {"m.NAME": codes, "m_absmax.NAME": scales, "v.NAME": ...}; `steps` is not among them.

        They are the tensors that `step` updates: clone them to come back to them later.
        """
        kinds = ("m", "m_absmax", "v", "v_absmax")
        return {f"{kind}.{name}": t for kind in kinds for name, t in getattr(self, kind).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, steps: int) -> None:
        """Take over what `state_dict` gave. Raises ValueError: names, shapes or dtypes are of another optimizer."""
        wanted = self.state_dict()
        odd = sorted(key for key in {*wanted, *state} if not _alike(wanted.get(key), state.get(key)))
        if odd:
            got, want = state.get(odd[0]), wanted.get(odd[0])
            said = [f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else "nothing" for t in (got, want)]
            raise ValueError(
                f"{odd[0]}: got {said[0]}, wanted {said[1]} ({len(odd)} such): the state of another model, or optimizer"
            )
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps={steps!r}, wanted a whole number from 0")
        for key, t in wanted.items():
            t.copy_(state[key])
        self.steps = steps


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _check(name: str, value: float, *, below: float = math.inf) -> None:
    if not (isinstance(value, float | int) and 0 <= value < below):
        raise QuantizationError(f"{name}={value!r}: wanted a number from 0 to less than {below:g}")
