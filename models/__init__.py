"""Models read from ordinary folders: decoder, encoder, tokenizer, generation. Start with README.md."""

from .decoder.cache import KVCache
from .decoder.config import DecoderConfig, decoder_config
from .decoder.decoder import Decoder
from .decoder.generate import Generation, GenerationStats, generate
from .decoder.sampling import Sampling
from .encoder.encoder import Encoder, load_encoder
from .errors import ConfigError, ModelError, TemplateError, TokenizerError, WeightsError
from .files.config_json import read_config
from .files.load import load_model
from .files.save import save_model, save_quantized
from .files.weights import Checkpoint, SafetensorsFile
from .text.tokenizer import Tokenizer, load_tokenizer

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
