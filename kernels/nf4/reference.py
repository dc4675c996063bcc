"""4-bit block quantization in plain torch. This file is the definition; every other backend must match it.

Quantize (QLoRA, arXiv:2305.14314, eq. 1 and section 3), per block of `block_size` elements of the flattened
tensor:

    absmax = max |w|                              one float32 per block
    code   = nearest(table, w / absmax)           4 bits per element
    w'     = table[code] * absmax                 float32 product, then one rounding to the target type

Double quantization: the absmax values are themselves block-quantized to 8 bits, 256 to a block, after their
mean is subtracted (they are all positive, the code is symmetric). Cost per weight at block size 64: 4 bits of
code, 8/64 of absmax, 32/(64*256) of nested absmax: 4.127 bits, where float32 absmax would make it 4.5.

Layout: blocks run over the row-major flattened tensor, across rows; byte i holds element 2i in its high
nibble (`>> 4`) and 2i+1 in its low one; an odd count pads with the code of zero.

The bytes are bitsandbytes' own (its CPU rule), so three of its choices are kept: w is multiplied by the
float32 reciprocal of absmax, but the ragged last block divides; a ragged last block of zeros stores absmax
1e-38; and 8-bit codes come from a grid of 65536 points, so about 1 in 1000 is the second nearest. Unlike
bitsandbytes, NaN and infinity are refused: one of them destroys its whole block.

Left out: quantizing from float64, and any search for a better absmax than the largest element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import QuantizationError
from .codebook import Kind, dynamic_grid, dynamic_table, table, thresholds
from .tensor import NESTED_BLOCK_SIZE, Nested, QuantizedTensor

TINY = 1e-38  # absmax below this counts as this: 0 * (1 / TINY) is 0, and 0 has a code
CHUNK = 1 << 20  # elements quantized at a time: a multiple of every block size, and temporaries stay small


def quantize(w: Tensor, *, kind: Kind, block_size: int) -> tuple[Tensor, Tensor]:
    """code = nearest(table, w / absmax), two codes to a byte.

    w: float32, float16 or bfloat16, any shape, all finite.
    Returns packed uint8 [ceil(numel / 2)] and absmax float32 [ceil(numel / block_size)].
    Raises QuantizationError: w holds a NaN or an infinity; the message names the first place.
    """
    flat = w.detach().reshape(-1)
    numel = flat.numel()
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=w.device)
    for start in range(0, numel, CHUNK):
        x = flat[start : start + CHUNK].float()
        scaled, scales = _scale_blocks(x, block_size)
        absmax[start // block_size :][: scales.numel()] = scales
        bounds, codes = thresholds(kind, w.device)
        # A tie goes to the lower number: bucketize counts the thresholds strictly below x.
        code = codes[torch.bucketize(F.pad(scaled, (0, scaled.numel() % 2)), bounds, out_int32=True)]
        packed[start // 2 :][: code.numel() // 2] = code[0::2] << 4 | code[1::2]
    if not torch.isfinite(absmax).all():
        raise QuantizationError(name_nonfinite(w))
    return packed, absmax


def _scale_blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x / absmax clamped to [-1, 1], and the absmax of each block; x is float32 and flat."""
    ragged = x.numel() % block_size
    full, tail = x[: x.numel() - ragged].view(-1, block_size), x[x.numel() - ragged :]
    absmax = full.abs().amax(dim=1)  # [blocks]
    scaled = (full * (1.0 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1).view(-1)
    if ragged:
        tail_absmax = tail.abs().amax().clamp(min=TINY)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, (tail / tail_absmax).clamp(-1, 1)])
    return scaled, absmax


def name_nonfinite(w: Tensor) -> str:
    """The message about the first place of `w` that is not finite."""
    where = torch.nonzero(~torch.isfinite(w))[0].tolist()
    value = w[tuple(where)].item()
    return f"w{where} is {value}: only finite values can be quantized; find out what produced it"


def dequantize(q: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """w[i] = table[code[i]] * absmax[i // block_size], of q.shape, rounded once to `dtype`.

    out: memory of that shape and dtype to write into.
    """
    packed, absmax = q.packed.view(-1), q.absmax.view(-1)
    if q.nested is not None:
        absmax = dequantize_absmax(absmax, Nested(q.nested.absmax.view(-1), q.nested.offset.view(())))
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1)[: q.numel]
    values = table(q.kind, packed.device)[codes.int()]
    blocks = F.pad(values, (0, -q.numel % q.block_size)).view(-1, q.block_size)  # [blocks, block_size]
    result = (blocks * absmax[:, None]).view(-1)[: q.numel].to(dtype).view(q.shape)
    return result if out is None else out.copy_(result)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Nested]:
    """8-bit codes of `absmax - mean(absmax)`: double quantization.

    absmax: float32 [blocks]. Returns codes uint8 [blocks] and what decodes them.
    Raises QuantizationError: the mean is beyond float32.
    """
    offset = nested_offset(absmax)
    blocks = absmax.numel()
    centred = F.pad(absmax - offset, (0, -blocks % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested = centred.abs().amax(dim=1)  # [ceil(blocks / 256)]
    # Where all scales are equal, 0 / 0 gets code 0, whose value no longer matters: it is multiplied by 0.
    scaled = (centred * (1.0 / nested)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    places = ((scaled + 1) * 0.5 * 65535 + 0.5).int()  # the nearest of 65536 grid points
    codes = dynamic_grid(absmax.device)[places]
    return codes.view(-1)[:blocks].clone(), Nested(nested, offset)


def nested_offset(absmax: Tensor) -> Tensor:
    """The mean of absmax, float32 []. Raises QuantizationError: it is not finite."""
    # On a CPU torch adds the parts of one long row in as many pieces as it has threads, which changes the last bit.
    # Of two rows (one, seen twice) each is added by one thread, in the order of a single-threaded `mean`.
    offset = absmax.expand(2, -1).mean(dim=1)[0].clone() if absmax.is_cpu else absmax.mean()
    if not torch.isfinite(offset):
        raise QuantizationError("the mean of absmax is beyond float32: scale the weights down, or double_quant=False")
    return offset


def dequantize_absmax(codes: Tensor, nested: Nested) -> Tensor:
    """absmax[j] = dynamic[code[j]] * nested.absmax[j // 256] + nested.offset

    codes: uint8 [blocks]. Returns float32 [blocks]; the product and the sum are each rounded.
    """
    scales = nested.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return dynamic_table(codes.device)[codes.int()] * scales + nested.offset
