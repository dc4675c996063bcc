"""The packed weights under DistributedDataParallel: sent once, when a model is wrapped, and not before each forward."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from qlorag.lora import LoRAConfig, attach
from qlorag.quant import QuantizedLinear
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), QuantizedLinear.from_linear(nn.Linear(64, 64)), nn.BatchNorm1d(64))


def broadcast(wrapped: DistributedDataParallel) -> list[str]:
    wrapped(torch.randn(4, 8)).sum().backward()
    return sorted(wrapped.named_module_buffers)


OTHERS = ["2.num_batches_tracked", "2.running_mean", "2.running_var"]


def test_ddp_broadcasts_other_buffers_only(group):
    assert broadcast(DistributedDataParallel(model())) == OTHERS
    assert broadcast(DistributedDataParallel(copy.deepcopy(model()))) == OTHERS
    adapted = model()
    attach(adapted, LoRAConfig(targets=["1"], r=2))
    assert broadcast(DistributedDataParallel(adapted)) == OTHERS
    nothing_else = nn.Sequential(nn.Linear(8, 64), QuantizedLinear.from_linear(nn.Linear(64, 64)))
    assert broadcast(DistributedDataParallel(nothing_else)) == []


def test_a_layer_that_is_replaced_after_wrapping_is_not_broadcast_either(group):
    wrapped = DistributedDataParallel(model())
    attach(wrapped.module, LoRAConfig(targets=["1"], r=2))
    wrapped.module[0].requires_grad_(True)
    assert broadcast(wrapped) == OTHERS


def _one_of_two(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)  # another base on each rank
    wrapped = DistributedDataParallel(model())
    packed = wrapped.module[1].packed
    gathered = [torch.empty_like(packed) for _ in range(2)]
    dist.all_gather(gathered, packed)
    assert torch.equal(*gathered)
    for _ in range(2):
        a, b = wrapped(torch.randn(4, 8)), wrapped(torch.randn(4, 8))
        (a.sum() + b.sum()).backward()
    assert sorted(wrapped.named_module_buffers) == OTHERS
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_start_from_the_same_packed_weight():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_of_two, (port,), nprocs=2)
