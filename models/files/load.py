"""A decoder from a model folder, tensor by tensor, so that memory never holds more than the result and one tensor.

The model is first built on torch's `meta` device, where parameters have shapes and no storage. Names and shapes are
compared with the checkpoint before a byte of weights is read. Then each tensor is read, cast, quantized if asked for,
and put into its place; nothing is initialized first and overwritten later. Weights that are stored in 4 bits
(bnb_folder.py) are put there as they are.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...quant import QuantizedLinear, QuantizedTensor
from ...quant import quantize as quantize_tensor
from ..decoder.config import decoder_config, stored_in_4_bits
from ..decoder.decoder import Decoder
from ..errors import ConfigError, WeightsError
from .bnb_folder import PackedWeight, check_packed_names, check_skipped, packed_weights, read_packed
from .checkpoint_names import use_known_names
from .config_json import read_config
from .weights import Checkpoint

QUANTIZE_KINDS = ("nf4", "fp4")


@torch.inference_mode(False)  # in that mode all parameters would be tensors that autograd refuses to keep
def load_model(
    folder: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    check_finite: bool = False,
) -> Decoder:
    """The decoder in a Hugging Face folder, frozen (no parameter requires a gradient) and in eval mode.

    folder:       holds config.json and safetensors, whose weights are dense or in bitsandbytes' 4 bits.
    quantize:     "nf4" or "fp4" stores every projection inside the layers in 4 bits (embedding, norms and head keep
                  dtype); None takes the folder as it is. A folder that is in 4 bits already asks for nothing: naming
                  its own kind changes nothing, not even its block size, and naming the other one is an error.
    block_size, double_quant: of the quantization done here, see `qlorag.quant.quantize`.
    dtype:        of dense weights and of the arithmetic.
    check_finite: refuse NaN and infinite weights by name; costs one pass over each tensor.
    Raises ConfigError, WeightsError: see the messages; nothing is half-loaded.
    """
    if quantize not in (None, *QUANTIZE_KINDS):
        raise ConfigError(f"quantize={quantize!r}, wanted {', '.join(QUANTIZE_KINDS)} or None")
    checkpoint, raw, source = Checkpoint(folder), read_config(folder), f"{os.fspath(folder)}/config.json"
    config = decoder_config(raw, source=source)
    use_known_names(checkpoint, layers=config.num_layers, tied=config.tied_head)
    _check_layers(config.num_layers, checkpoint)
    with torch.device("meta"):
        model = Decoder(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    linears = {f"{n}.weight" for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
    packed: dict[str, PackedWeight] = {}
    if stored_in_4_bits(raw, source=source):
        packed = packed_weights(checkpoint)
        check_packed_names(packed, checkpoint, dense=parameters.keys() - linears)
        check_skipped(packed, raw, source=source)
        _check_kind(quantize, packed, source)
        quantize = None  # done already
    head = _tie(model, checkpoint)
    _check_names(parameters, checkpoint, packed, optional=() if head else ("lm_head.weight",))
    _check_shapes(parameters, checkpoint, packed)
    # One buffer for all tensors that are packed and then dropped: malloc would leave holes of their sizes behind.
    sizes = [checkpoint.nbytes(name) for name in linears] if quantize else []
    scratch = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    for name in parameters:
        if name == "lm_head.weight" and not head:
            continue
        if name in packed:
            _put_quantized(model, name, read_packed(checkpoint, name, packed[name], check_finite=check_finite))
            continue
        packs = quantize is not None and name in linears
        tensor = _read(checkpoint, name, scratch=scratch if packs else None, check_finite=check_finite)
        if packs:
            # From the stored values, not from a copy rounded to the compute dtype.
            q = quantize_tensor(tensor, kind=str(quantize), block_size=block_size, double_quant=double_quant)
            _put_quantized(model, name, q)
        else:
            _put_parameter(model, name, tensor.to(dtype))
    if not head:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.fingerprint = checkpoint.fingerprint()
    return model.eval()


def _check_kind(wanted: str | None, packed: Mapping[str, PackedWeight], source: str) -> None:
    """Refuses to change one 4-bit code into the other: what the first rounded away would be rounded again."""
    if wanted is None:
        return
    others = sorted(name for name, weight in packed.items() if weight.state.kind != wanted)
    if others:
        raise ConfigError(
            f"{source}: quantize={wanted!r}, but {others[0]} is stored as {packed[others[0]].state.kind}: "
            "leave quantize out, or give the unquantized model"
        )


def _tie(model: Decoder, checkpoint: Checkpoint) -> bool:
    """Whether the head has weights of its own, as transformers decides it; unties the model if so."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if not model.config.tied_head:
        return True
    if head not in checkpoint or embed not in checkpoint:
        return False
    if checkpoint.shape(head) == checkpoint.shape(embed) and torch.equal(checkpoint.read(head), checkpoint.read(embed)):
        return False
    warnings.warn(
        f"{checkpoint.folder}: config.json ties the head to the embedding, but {head} differs: keeping both",
        stacklevel=3,
    )
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight), requires_grad=False)
    return True


def _check_layers(wanted: int, checkpoint: Checkpoint) -> None:
    """Refuses an absurd number of layers before they are built; `_check_names` compares the rest by name."""
    found = (re.match(r"model\.layers\.(\d+)\.", name) for name in checkpoint.names())
    got = len({match[1] for match in found if match})
    if wanted > 10 * got + 10:
        raise WeightsError(
            f"{checkpoint.folder}: num_hidden_layers={wanted} in config.json, but the checkpoint holds {got} layers: "
            "one of the two is from another model"
        )


def _check_names(
    parameters: Iterable[str],
    checkpoint: Checkpoint,
    packed: Mapping[str, PackedWeight],
    *,
    optional: tuple[str, ...],
) -> None:
    wanted = set(parameters)
    got = set(checkpoint.names()).difference(*(weight.parts[1:] for weight in packed.values()))
    missing = sorted(wanted - got - set(optional))
    # Old exports carry RoPE's constants; they follow from config.json and are computed here.
    unexpected = sorted(n for n in got - wanted if not n.endswith("rotary_emb.inv_freq"))
    if missing or unexpected:
        raise WeightsError(
            f"{checkpoint.folder}: tensors do not fit config.json: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}: is it the config of another model?"
        )


def _check_shapes(
    parameters: dict[str, nn.Parameter], checkpoint: Checkpoint, packed: Mapping[str, PackedWeight]
) -> None:
    for name, parameter in parameters.items():
        if name not in checkpoint:
            continue
        got = packed[name].state.shape if name in packed else checkpoint.shape(name)
        if got != tuple(parameter.shape):
            raise WeightsError(
                f"{checkpoint.file(name)}: {name} has shape {list(got)}, config.json makes it "
                f"{list(parameter.shape)}: one of the two files is from another model"
            )


def _some(names: list[str], *, most: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read(checkpoint: Checkpoint, name: str, *, scratch: Tensor | None, check_finite: bool) -> Tensor:
    tensor = checkpoint.read(name, scratch=scratch)
    if not tensor.is_floating_point():
        raise WeightsError(
            f"{checkpoint.file(name)}: {name} has dtype {checkpoint.dtype(name)}, wanted floating point: "
            "give the unquantized model"
        )
    if check_finite and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightsError(
            f"{checkpoint.file(name)}: {name} holds {bad} NaN or infinite values of {tensor.numel()}: "
            "the checkpoint is damaged"
        )
    return tensor


def _put_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))


def _put_quantized(model: nn.Module, name: str, q: QuantizedTensor) -> None:
    """Puts a QuantizedLinear where the nn.Linear of the weight `name` is; its bias follows as a parameter."""
    path = name.removesuffix(".weight")
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)  # only projections get here
    model.set_submodule(path, QuantizedLinear.from_quantized(q, bias=linear.bias))
