"""Models read from ordinary folders: decoder, encoder, tokenizer, generation. Start with README.md."""

from .cache import KVCache
from .config import DecoderConfig, decoder_config, read_config
from .decoder import Decoder
from .encoder import Encoder, load_encoder
from .errors import ConfigError, ModelError, TemplateError, TokenizerError, WeightsError
from .generate import Generation, GenerationStats, generate
from .load import load_model
from .sampling import Sampling
from .save import save_model, save_quantized
from .tokenizer import Tokenizer, load_tokenizer
from .weights import Checkpoint, SafetensorsFile

__all__ = [
    "Checkpoint",
    "ConfigError",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "Generation",
    "GenerationStats",
    "KVCache",
    "ModelError",
    "SafetensorsFile",
    "Sampling",
    "TemplateError",
    "Tokenizer",
    "TokenizerError",
    "WeightsError",
    "decoder_config",
    "generate",
    "load_encoder",
    "load_model",
    "load_tokenizer",
    "read_config",
    "save_model",
    "save_quantized",
]
