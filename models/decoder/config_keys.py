"""Which keys of config.json are read, which change nothing here, and which would be lost.

A test goes through the configuration classes of transformers: each of their keys is read, or is in IRRELEVANT, or is
checked by `check_keys`. A key that none of them has belongs to another program, and is named in a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

READ = frozenset((
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
    "original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "quantization_config", "quantization",
))  # fmt: skip
# What a decoder's numbers do not depend on: how it was made, stored, generated from or split over machines.
IRRELEVANT = frozenset((
    "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "dtype", "torch_dtype",
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "is_encoder_decoder", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "keys_to_ignore_at_inference", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "task_specific_params", "unsloth_fixed",
    "unsloth_version", "transformers.js_config", "is_llama_config",
    "pretraining_tp",  # how a product was split when it was trained; transformers 5 reads it no more
))  # fmt: skip
# The one value that these may have: another would change the numbers, and is not implemented.
ONLY = {
    "use_mrope": (False, "rotary positions of images"),
    "rope_interleaved": (False, "rotary embedding of neighbouring pairs"),
    "use_qk_norm": (False, "norms of queries and keys"),
    "attention_multiplier": (None, "a scale of the attention"),
    "attn_logit_softcapping": (None, "a cap of the attention's logits"),
    "final_logit_softcapping": (None, "a cap of the logits"),
    "logit_scale": (None, "a scale of the logits"),
    "logits_scaling": (None, "a scale of the logits"),
    "embedding_multiplier": (None, "a scale of the embedding"),
    "residual_multiplier": (None, "a scale of the residuals"),
    "num_experts": (None, "a mixture of experts"),
    "num_local_experts": (None, "a mixture of experts"),
    "n_routed_experts": (None, "a mixture of experts"),
    "query_pre_attn_scalar": (None, "a scale of the queries"),
    "no_rope_layers": (None, "layers without rotary embedding"),
    "qk_layernorm": (False, "norms of queries and keys"),
    "clip_qkv": (None, "clipped queries, keys and values"),
}


def check_keys(raw: Mapping[str, Any], *, source: str) -> None:
    """Raise ConfigError for a key that changes the numbers and is not implemented; warn of one that is unknown.

    raw: config.json as a dict.  source: its name, for messages.
    """
    for key, (only, meaning) in ONLY.items():
        if raw.get(key) not in (None, only):
            raise ConfigError(f"{source}: {key}={raw[key]!r:.60} is not implemented: it asks for {meaning}")
    if dropout := raw.get("attention_dropout"):
        warnings.warn(f"{source}: attention_dropout={dropout!r:.20} is not applied in training", stacklevel=3)
    known = READ | IRRELEVANT | ONLY.keys() | {"attention_dropout"}
    unknown = sorted(key for key in raw if key not in known and raw[key] not in (None, False, [], {}))
    if unknown:
        warnings.warn(
            f"{source}: not read: {', '.join(unknown)[:300]}: if the model needs it, its answers will be wrong",
            stacklevel=3,
        )
