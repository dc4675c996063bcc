"""config.json of a decoder, read strictly: what the mathematics needs, every default stated, nothing ignored.

Four families share one block (RMSNorm, grouped-query attention with RoPE, SwiGLU) and differ only in switches:

| model_type | biases                        | q/k norm | sliding window                                        |
|------------|-------------------------------|----------|-------------------------------------------------------|
| llama      | q,k,v,o if `attention_bias`   | no       | no                                                    |
| mistral    | none                          | no       | `sliding_window`, 4096 when absent, or `layer_types`  |
| qwen2      | q,k,v always                  | no       | if `use_sliding_window`, from `max_window_layers` on  |
| qwen3      | q,k,v,o if `attention_bias`   | per head | as qwen2                                              |

A setting that would change the numbers and is not implemented is refused by name: a model that loads and answers
slightly wrong is worse than one that does not load.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .config_keys import check_keys

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Far above any model, and low enough that no arithmetic here or in torch overflows: a damaged file is told so.
MAX_LAYERS = 10_000
MAX_ELEMENTS = 2**40  # of one matrix
MAX_NUMBER = 1e18


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear, dynamic, llama3, yarn or longrope; `options` are its numbers."""

    kind: str
    theta: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder's mathematics depends on. Sizes count elements; `windows[i]` is None for full attention."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool


def decoder_config(raw: dict[str, Any], *, source: str = "config.json") -> DecoderConfig:
    """The checked configuration of a decoder.

    raw: config.json as a dict.  source: the file's name, for messages.
    Raises ConfigError: unknown model_type, a missing or ill-typed field, or a setting not implemented.
    """
    get = _Getter(raw, source)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{source}: model_type={family!r:.60} is not supported, only {', '.join(FAMILIES)}")
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(f"{source}: hidden_act={act!r:.60} is not implemented, only silu")
    check_keys(raw, source=source)
    stored_in_4_bits(raw, source=source)  # which is fine, and any other quantization is refused

    heads, hidden, layers = get.size("num_attention_heads"), get.size("hidden_size"), get.size("num_hidden_layers")
    kv_default = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}[family]
    kv_heads = get.size("num_key_value_heads", kv_default if "num_key_value_heads" not in raw else heads)
    head_dim = get.size("head_dim", 128 if family == "qwen3" else hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"{source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if head_dim % 2:
        raise ConfigError(f"{source}: head_dim={head_dim} is odd: rotary embedding turns pairs of dimensions")
    vocab, intermediate = get.size("vocab_size"), get.size("intermediate_size")
    if layers > MAX_LAYERS:
        raise ConfigError(f"{source}: num_hidden_layers={layers}, wanted at most {MAX_LAYERS}")
    # Even on the meta device a matrix must have a size that torch can count.
    for name, rows in (("vocab_size", vocab), ("intermediate_size", intermediate), ("head_dim", heads * head_dim)):
        if rows * hidden > MAX_ELEMENTS:
            raise ConfigError(
                f"{source}: {name}={raw.get(name, head_dim)} and hidden_size={hidden} make a matrix of {rows * hidden} "
                f"elements, wanted at most 2^40: the file is damaged"
            )
    max_positions = get.size("max_position_embeddings", 2048)
    attention_bias = get.flag("attention_bias", False)
    return DecoderConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=get.number("rms_norm_eps", 1e-6),
        rope=_rope(raw, get, max_positions, head_dim),
        windows=_windows(raw, get, family, layers),
        qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
        o_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and get.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        tied_head=get.flag("tie_word_embeddings", False),
    )


def stored_in_4_bits(raw: dict[str, Any], *, source: str = "config.json") -> bool:
    """Whether the weights are in bitsandbytes' 4-bit form; if not, they are dense.

    Raises ConfigError: they are quantized in another way.
    """
    if isinstance(raw.get("quantization"), dict):
        raise ConfigError(
            f"{source}: the weights are quantized by MLX ({raw['quantization'].get('bits')} bits), which is not read: "
            "give the unquantized model, or one that mlx_lm.convert --dequantize wrote"
        )
    if raw.get("quantization_config") is None:
        return False
    section = _Getter(raw, source).mapping("quantization_config")
    method = section.get("quant_method", "bitsandbytes" if "load_in_4bit" in section else None)  # old files lack it
    four, eight = (any(section.get(p + key) is True for p in ("", "_")) for key in ("load_in_4bit", "load_in_8bit"))
    if method == "bitsandbytes" and four and not eight:
        return True
    what = " ".join(str(method).split())[:60] + (" in 8 bits" if eight else "")
    raise ConfigError(
        f"{source}: the weights are already quantized ({what}), and only bitsandbytes' 4 bits are read here: "
        "give the unquantized model and quantize here"
    )


_ROPE_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_ROPE_ALIASES = {"su": "longrope"}
_ROPE_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor",
)  # fmt: skip
_ROPE_KNOWN = frozenset((
    *_ROPE_NUMBERS, "rope_theta", "rope_type", "type", "partial_rotary_factor", "mscale", "mscale_all_dim", "truncate",
    "short_factor", "long_factor", "max_position_embeddings",
    "finetuned",  # how the model was made; nothing reads it
))  # fmt: skip


def _rope(raw: dict[str, Any], get: _Getter, max_positions: int, head_dim: int) -> RopeConfig:
    """Both spellings: v5's `rope_parameters`, and `rope_theta` beside `rope_scaling` before it."""
    new, old = get.mapping("rope_parameters"), get.mapping("rope_scaling")
    _check_spellings(raw, get, new, old)
    field_name = "rope_parameters" if new else "rope_scaling"
    options = dict(new or old)
    inner = _Getter(options, get.source, prefix=f"{field_name}.")
    theta = inner.positive("rope_theta", get.positive("rope_theta", 10000.0))
    kind = options.get("rope_type") or options.get("type") or "default"
    kind = _ROPE_ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _ROPE_REQUIRED:
        raise ConfigError(f"{get.source}: rope type {kind!r:.60} is not implemented, only {', '.join(_ROPE_REQUIRED)}")
    if raw.get("partial_rotary_factor", options.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{get.source}: partial_rotary_factor other than 1 is not implemented")
    unknown = sorted(k for k, v in options.items() if k not in _ROPE_KNOWN and v is not None)
    if unknown:
        raise ConfigError(f"{get.source}: {field_name}.{unknown[0]} is not implemented for rope type {kind}")
    missing = [k for k in _ROPE_REQUIRED[kind] if options.get(k) is None]
    if missing:
        raise ConfigError(f"{get.source}: rope type {kind} without {', '.join(missing)}")
    for name in ("rope_theta", "rope_type", "type", "partial_rotary_factor"):
        options.pop(name, None)
    if kind != "default":
        _check_rope_options(inner, head_dim)
        top = get.number("original_max_position_embeddings", 0)  # Phi-style files keep it outside; it wins
        options["original_max_position_embeddings"] = (
            top or options.get("original_max_position_embeddings") or max_positions
        )
        options["max_position_embeddings"] = max_positions
    if kind in ("yarn", "longrope") and (theta <= 1 or options["original_max_position_embeddings"] <= 1):
        raise ConfigError(
            f"{get.source}: rope type {kind} with rope_theta={theta:g} and original_max_position_embeddings="
            f"{options['original_max_position_embeddings']}, wanted both above 1: their logarithms are divided by"
        )
    if kind == "dynamic" and head_dim < 4:
        raise ConfigError(f"{get.source}: rope type dynamic with head_dim={head_dim}, wanted at least 4")
    if kind == "llama3" and not options["low_freq_factor"] < options["high_freq_factor"]:
        raise ConfigError(
            f"{get.source}: {inner.prefix}low_freq_factor={options['low_freq_factor']} is not below "
            f"high_freq_factor={options['high_freq_factor']}"
        )
    return RopeConfig(kind, theta, options)


def _check_spellings(raw: dict[str, Any], get: _Getter, new: dict[str, Any], old: dict[str, Any]) -> None:
    """Where config.json spells RoPE twice, both must say the same: programs differ in which of them they read."""
    if not new or (not old and raw.get("rope_theta") is None):
        return
    theta = get.positive("rope_theta", 10000.0)
    first, second = _spelled(new, theta), _spelled(old, theta)
    if old and first != second:
        raise ConfigError(
            f"{get.source}: rope_parameters and rope_scaling contradict each other ({_difference(first, second)}): "
            "keep one of them, or make them equal"
        )
    if not old and first["rope_theta"] != theta:
        warnings.warn(
            f"{get.source}: rope_theta={theta:g} is not read, since rope_parameters has its own, "
            f"{first['rope_theta']!r:.30}",
            stacklevel=4,
        )


def _spelled(options: dict[str, Any], theta: float) -> dict[str, Any]:
    """One spelling with the names of the other."""
    kind = options.get("rope_type") or options.get("type") or "default"
    rest = {k: v for k, v in options.items() if k not in ("rope_type", "type") and v is not None}
    return {"rope_theta": theta, **rest, "rope_type": _ROPE_ALIASES.get(str(kind), kind)}


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    key = next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))
    return f"{key} is {a.get(key)!r:.40} and {b.get(key)!r:.40}"


def _check_rope_options(get: _Getter, head_dim: int) -> None:
    """Every option that `rope` reads is of its type; one that is absent or null is left to its default there."""
    for name in _ROPE_NUMBERS:
        get.positive(name, 1.0)
    for name in ("mscale", "mscale_all_dim"):
        get.number(name, 0.0)  # 0 switches them off
    get.flag("truncate", True)
    for name in ("short_factor", "long_factor"):
        get.positives(name, length=head_dim // 2)


def _windows(raw: dict[str, Any], get: _Getter, family: str, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    window = raw.get("sliding_window", 4096)
    if window is not None:
        window = get.size("sliding_window", 4096)
    kinds = raw.get("layer_types")
    if family == "mistral" and kinds is None:
        return (window,) * layers
    if family != "mistral" and not get.flag("use_sliding_window", False):
        return (None,) * layers
    if kinds is None:
        first = get.number("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in list(known) for k in kinds):
        raise ConfigError(f"{get.source}: layer_types must name {layers} layers, each {' or '.join(known)}")
    return tuple(known[k] for k in kinds)


class _Getter:
    """Typed access to config.json, with the field and the file in every complaint; null counts as absent."""

    def __init__(self, raw: dict[str, Any], source: str, *, prefix: str = "") -> None:
        self.raw, self.source, self.prefix = raw, source, prefix

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.source}: {self.prefix}{key} is missing")
        return value

    def _fault(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self.prefix}{key}={self.raw.get(key)!r:.60}, wanted {wanted}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= MAX_ELEMENTS:
            raise ConfigError(
                f"{self.source}: {self.prefix}{key}={value!r:.60}, wanted a whole number of at least 1, at most 2^40"
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not _is_number(value):
            raise self._fault(key, f"a number from 0 to {MAX_NUMBER:g}")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not _is_number(value) or value == 0:
            raise self._fault(key, f"a number above 0, at most {MAX_NUMBER:g}")
        return float(value)

    def positives(self, key: str, *, length: int) -> None:
        value = self.raw.get(key)
        if value is None:
            return
        if not isinstance(value, list) or not all(_is_number(v) and v > 0 for v in value):
            raise self._fault(key, f"a list of {length} numbers above 0")
        if len(value) != length:
            raise ConfigError(
                f"{self.source}: rope {key} has {len(value)} entries, head_dim={2 * length} wants {length}"
            )

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._fault(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._fault(key, "an object")
        return value


def _is_number(value: Any) -> bool:
    # The comparison also refuses NaN, infinity, and integers beyond any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_NUMBER
