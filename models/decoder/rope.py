"""Rotary position embedding and its published extensions to longer contexts.

RoPE (arXiv:2104.09864) turns each pair of query and key dimensions (i, i + d/2) by the angle p * inv_freq[i] at
position p, so that their dot product depends on the distance of positions alone:

    inv_freq[i] = theta^(-2i/d)
    rope(x)     = x * cos + cat(-x2, x1) * sin          x = cat(x1, x2): the "half-split" layout of Hugging Face files

This file makes the tables of cos and sin, kernels/rope/ applies them. The extensions change inv_freq, and two of them
also scale cos and sin:

    linear    inv_freq / f                                              (arXiv:2306.15595)
    dynamic   theta grows with the length once it passes the trained one ("NTK-aware")
    llama3    long wavelengths / f, short ones kept, smooth between     (Llama 3.1)
    yarn      a ramp between inv_freq / f and inv_freq, cos and sin * (0.1 ln f + 1)   (arXiv:2309.00071)
    longrope  inv_freq / per-dimension factors, one set for short and one for long     (arXiv:2402.13753)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import RopeConfig


class Rope:
    """cos and sin for any positions of one model.

    config: kind and numbers.  head_dim: d, even.
    """

    def __init__(self, config: RopeConfig, *, head_dim: int) -> None:
        self.config, self.head_dim = config, head_dim
        self.scale = _attention_factor(config)
        self._by_length = config.kind in ("dynamic", "longrope")
        self._inv_freq = inverse_frequencies(config, head_dim=head_dim, length=0)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: int64 [T].  Returns cos and sin, each [T, head_dim] in dtype; angles are float32 until then."""
        inv_freq = self._inv_freq
        if self._by_length and positions.numel():
            inv_freq = inverse_frequencies(self.config, head_dim=self.head_dim, length=int(positions.max()) + 1)
        angles = positions.to(torch.float32)[:, None] * inv_freq.to(positions.device)[None, :]  # [T, d/2]
        angles = torch.cat((angles, angles), dim=-1)  # [T, d]
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def inverse_frequencies(config: RopeConfig, *, head_dim: int, length: int) -> Tensor:
    """inv_freq, float32 [head_dim / 2], on the CPU even while a model is built on meta.

    length: tokens in the sequence; only dynamic and longrope look at it.

    Raises ConfigError: longrope's factor lists do not have head_dim / 2 entries.
    """
    o, theta, d = config.options, config.theta, head_dim
    factor = float(o.get("factor") or 1.0)
    if config.kind == "dynamic":
        trained = o["max_position_embeddings"]
        longest = max(length, trained)
        theta *= ((factor * longest / trained) - (factor - 1)) ** (d / (d - 2))
    exponent = torch.arange(0, d, 2, dtype=torch.int64, device="cpu").to(torch.float32) / d
    inv = 1.0 / (theta**exponent)
    if config.kind == "linear":
        return inv / factor
    if config.kind == "llama3":
        return _llama3(inv, factor, o)
    if config.kind == "yarn":
        return _yarn(inv, factor, o, theta, d)
    if config.kind == "longrope":
        name = "long_factor" if length > o["original_max_position_embeddings"] else "short_factor"
        if len(o[name]) != d // 2:
            raise ConfigError(f"config.json: rope {name} has {len(o[name])} entries, head_dim={d} wants {d // 2}")
        return 1.0 / (torch.tensor(o[name], dtype=torch.float32, device="cpu") * theta**exponent)
    return inv


def _llama3(inv: Tensor, factor: float, o: dict[str, float]) -> Tensor:
    old, low, high = o["original_max_position_embeddings"], o["low_freq_factor"], o["high_freq_factor"]
    wavelength = 2 * math.pi / inv
    smooth = (old / wavelength - low) / (high - low)
    between = (1 - smooth) * inv / factor + smooth * inv
    out = torch.where(wavelength > old / low, inv / factor, between)
    return torch.where(wavelength < old / high, inv, out)


def _yarn(inv: Tensor, factor: float, o: dict[str, float], theta: float, d: int) -> Tensor:
    old = o["original_max_position_embeddings"]

    def dimension(turns: float) -> float:  # the dimension that makes this many turns over the trained context
        return d * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(o.get("beta_fast") or 32.0), dimension(o.get("beta_slow") or 1.0)
    if o.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # the ramp must have a width
    ramp = ((torch.arange(d // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return (inv / factor) * ramp + inv * (1 - ramp)


def _attention_factor(config: RopeConfig) -> float:
    o = config.options
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if o.get("attention_factor") is not None:
        return float(o["attention_factor"])
    old = o["original_max_position_embeddings"]
    factor = o.get("factor") or o["max_position_embeddings"] / old
    if config.kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))

    def mscale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if o.get("mscale") and o.get("mscale_all_dim"):
        return mscale(o["mscale"]) / mscale(o["mscale_all_dim"])
    return mscale(1.0)
