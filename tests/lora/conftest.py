"""A tiny transformer as a host for adapters: its module names are those of every llama-type model."""

from __future__ import annotations

import pytest
import torch
from qlorag.lora import LoRALinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class FakeQuantized(nn.Module):
    """A quantized linear layer by duck type: 8-bit codes in a buffer, decoded in each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = linear.weight.detach().float()
        self.register_buffer("absmax", weight.abs().max())
        self.register_buffer("codes", (weight / self.absmax * 127).round().to(torch.int8))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.float() * self.absmax / 127).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype), self.bias)


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Give every B a value, so that an adapter does something without having been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            noise = torch.randn(module.lora_B.shape, generator=generator) * 0.1
            module.lora_B.data.copy_(noise)


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(40).reshape(2, 20) * 7 % 64


@pytest.fixture
def make_llama():
    return tiny_llama


@pytest.fixture
def quantized_class():
    return FakeQuantized


@pytest.fixture
def fill_b():
    return randomize
