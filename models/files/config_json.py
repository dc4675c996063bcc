"""config.json of a model folder, unchanged: decoder/config.py and encoder/bert.py say what it means."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a model folder, as a dict. Raises ConfigError: it is missing or is not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found: give the folder of a Hugging Face model") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read ({fault.strerror})") from None
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"{path}: not JSON ({fault}): download it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a JSON {type(config).__name__}, wanted an object")
    return config
