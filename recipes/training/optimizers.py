"""AdamW, as published: Adam with the weight decay taken out of the gradient            (arXiv:1711.05101, algorithm 2)

    m = b1 m + (1 - b1) g                    mean of the gradient
    v = b2 v + (1 - b2) g²                   mean of its square
    p = p - lr · wd · p
    p = p - lr · m̂ / (√v̂ + eps)              m̂ = m / (1 - b1^t),  v̂ = v / (1 - b2^t): both began at zero

Why not torch.optim: making one of its optimizers imports torch's compiler, which takes 117 MB and a second; a whole
QLoRA step of the demo's model fits in less. The update is the same, and a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class AdamW:
    """Updates named parameters in place; m and v are kept in each parameter's dtype.

    Attributes: `steps`, how many updates were made; `m`, `v`, {name: tensor}. A resumed run needs these three.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = dict(parameters)
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.steps = 0
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient. lr: this step's learning rate."""
        self.steps += 1
        b1, b2 = self.betas
        unbias_m, unbias_v = 1 - b1**self.steps, 1 - b2**self.steps
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            m, v = self.m[name], self.v[name]
            m.lerp_(p.grad, 1 - b1)
            v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
            if self.weight_decay:
                p.mul_(1 - lr * self.weight_decay)
            p.addcdiv_(m, v.sqrt().div_(math.sqrt(unbias_v)).add_(self.eps), value=-lr / unbias_m)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """m and v as {"m.NAME": tensor, "v.NAME": tensor}; `steps` is not among them."""
        return {f"{kind}.{name}": t for kind in ("m", "v") for name, t in getattr(self, kind).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], *, steps: int) -> None:
        """Takes over what `state_dict` gave. Raises ValueError: names or shapes are not those of the parameters."""
        wanted = {key: t.shape for key, t in self.state_dict().items()}
        odd = sorted(key for key in {*wanted, *state} if key not in state or wanted.get(key) != state[key].shape)
        if odd:
            raise ValueError(f"{odd[0]} is missing, unexpected or of another shape ({len(odd)} such)")
        for kind in ("m", "v"):
            for name, t in getattr(self, kind).items():
                t.copy_(state[f"{kind}.{name}"])
        self.steps = steps


def clip_gradients(parameters: Mapping[str, nn.Parameter], limit: float) -> float:
    """Scales all gradients so that their joint norm is at most `limit` (0: no limit); returns the norm before.

    Where the norm is not finite, nothing is scaled: the caller has to throw the step away.
    """
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    if limit and math.isfinite(norm) and norm > limit:
        for g in gradients:
            g.mul_(limit / norm)
    return norm
