"""LoRA: a trainable low-rank update beside a frozen linear layer, saved in PEFT's format, merged."""

from .attach import adapter_state, attach, count_parameters, describe_parameters, detach, trainable_parameters
from .config import LoRAConfig, scaling
from .errors import AdapterError
from .files import AdapterInfo, adapter_info, save_adapter
from .layer import LoRALinear
from .load import load_adapter
from .merge import LayerMerge, MergeReport, merge, to_dense

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "LayerMerge",
    "LoRAConfig",
    "LoRALinear",
    "MergeReport",
    "adapter_info",
    "adapter_state",
    "attach",
    "count_parameters",
    "describe_parameters",
    "detach",
    "load_adapter",
    "merge",
    "save_adapter",
    "scaling",
    "to_dense",
    "trainable_parameters",
]
