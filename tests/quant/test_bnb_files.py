"""bitsandbytes' tensors of one weight: the same bytes both ways, the same numbers, and every fault named."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qlorag.kernels.nf4 import BLOCK_SIZES, DYNAMIC, FP4, NF4
from qlorag.quant import QuantizationError, QuantizedTensor, dequantize, from_bnb, quantize, to_bnb
from qlorag.quant.bnb_files import owner

pytestmark = pytest.mark.isa

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def parts(q: QuantizedTensor) -> tuple[torch.Tensor, ...]:
    return tuple(p for p in (q.packed, q.absmax, q.nested_absmax, q.nested_offset) if p is not None)


def assert_same_bytes(got: Tensors, wanted: Tensors) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert got[key].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), key


# What is written.


def test_by_hand() -> None:
    """The golden tensor of kernels/nf4: codes, scales and JSON as bitsandbytes 0.50 wrote them."""
    x = torch.tensor([(((i * 37) % 101) - 50) / 64 * (1 if i < 64 else 0.25) for i in range(128)]).view(2, 64)
    tensors = to_bnb(quantize(x, double_quant=True), NAME)
    assert {key.removeprefix(NAME): (t.dtype, list(t.shape)) for key, t in tensors.items()} == {
        "": (torch.uint8, [64, 1]),
        ".absmax": (torch.uint8, [2]),
        ".quant_map": (torch.float32, [16]),
        ".nested_absmax": (torch.float32, [1]),
        ".nested_quant_map": (torch.float32, [256]),
        ".quant_state.bitsandbytes__nf4": (torch.uint8, [len(tensors[STATE])]),
    }
    assert tensors[NAME].view(-1)[:8].numpy().tobytes().hex() == "04c16e29f3b05d17"
    assert tensors[f"{NAME}.absmax"].tolist() == [255, 0]
    assert tensors[f"{NAME}.nested_absmax"].tolist() == [0.29296875]
    assert bytes(tensors[STATE].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.48828125}'
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torchs_default_dtype_has_no_part_in_it(dtype: torch.dtype) -> None:
    w = randn(8, 64)
    q = quantize(w, double_quant=True)
    want = to_bnb(q, NAME)
    torch.set_default_dtype(dtype)
    try:
        assert_same_bytes(to_bnb(q, NAME), want)
        assert_same_bytes(to_bnb(quantize(w, double_quant=True), NAME), want)
    finally:
        torch.set_default_dtype(torch.float32)


# 23 x 45: an odd number of weights, a ragged last block, rows that end inside a block. 300 x 64: two nested blocks.
@pytest.mark.parametrize("shape", [(23, 45), (1, 1), (300, 64)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_round_trip_is_exact(kind: str, double_quant: bool, shape: tuple[int, int]) -> None:
    for block_size in BLOCK_SIZES:
        q = quantize(randn(*shape, dtype=torch.bfloat16), kind=kind, block_size=block_size, double_quant=double_quant)
        written = to_bnb(q, NAME)
        read = from_bnb(written, NAME)
        assert (read.kind, read.block_size, read.shape, read.dtype) == (kind, block_size, shape, torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(parts(read), parts(q), strict=True))
        assert read.packed.data_ptr() == q.packed.data_ptr()  # nothing is copied
        assert_same_bytes(to_bnb(read, NAME), written)


def test_other_weights_are_left_alone() -> None:
    both = to_bnb(quantize(randn(4, 64)), "a.weight") | to_bnb(quantize(randn(8, 32)), "aa.weight")
    assert from_bnb(both, "a.weight").shape == (4, 64) and from_bnb(both, "aa.weight").shape == (8, 32)
    assert {owner(key) for key in both} == {None, "a.weight", "aa.weight"}
    assert [key for key in both if owner(key) is None] == ["a.weight", "aa.weight"]


@pytest.mark.parametrize(("ulps", "read"), [(2, True), (-2, True), (8, False)])
def test_the_table_of_the_scales_may_be_a_processors(ulps: int, read: bool) -> None:
    """bitsandbytes' last bits of it depend on the processor (findings/bitsandbytes_map_depends_on_processor.sh)."""
    q = quantize(randn(300, 64), double_quant=True)
    written = to_bnb(q, NAME)
    table = torch.tensor(DYNAMIC)
    written[f"{NAME}.nested_quant_map"] = torch.where(
        table == 0, table, (table.view(torch.int32) + ulps).view(torch.float32)
    )
    if read:
        assert all(torch.equal(a, b) for a, b in zip(parts(from_bnb(written, NAME)), parts(q), strict=True))
    else:
        with pytest.raises(QuantizationError, match="weights of another table"):
            from_bnb(written, NAME)


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"got shape \[4, 4, 4\], wanted \[N, K\]"):
        to_bnb(quantize(randn(4, 4, 4)), NAME)


# Against bitsandbytes. Its CPU decode is right where rows are a multiple of the block size (kernels/nf4/README.md).


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_tensors_both_ways(kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    for block_size in BLOCK_SIZES:
        w = randn(24, 2 * block_size, dtype=dtype)
        packed, state = bnb.quantize_4bit(
            w, blocksize=block_size, compress_statistics=double_quant, quant_type=kind, quant_storage=torch.uint8
        )
        theirs = {NAME: packed} | {f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}
        q = from_bnb(theirs, NAME)
        decoded = bnb.dequantize_4bit(packed, state)
        assert decoded.dtype == dtype and torch.equal(dequantize(q), decoded)
        assert_same_bytes(to_bnb(q, NAME), theirs)
        # Quantized here: the very tensors, and bitsandbytes decodes from them what is decoded here.
        ours = to_bnb(quantize(w, kind=kind, block_size=block_size, double_quant=double_quant), NAME)
        assert_same_bytes(ours, theirs)
        stats = {key.removeprefix(f"{NAME}."): value for key, value in ours.items() if key != NAME}
        again = bnb.QuantState.from_dict(stats, device=torch.device("cpu"))
        assert torch.equal(bnb.dequantize_4bit(ours[NAME], again), decoded)


@pytest.mark.oracle
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_another_quant_storage_is_a_view_of_the_bytes(storage: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    w = randn(16, 64)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage
    theirs = {NAME: packed} | {f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert torch.equal(from_bnb(theirs, NAME).packed, quantize(w, double_quant=False).packed)


# What is refused. Each case changes the tensors of one good weight, nested or not.


GOOD = {nested: to_bnb(quantize(randn(48, 64), double_quant=nested), NAME) for nested in (True, False)}


def good(*, nested: bool) -> Tensors:
    """[48, 64] in blocks of 64: 1536 bytes of codes, 48 scales."""
    return {key: tensor.clone() for key, tensor in GOOD[nested].items()}


Change = Callable[[Tensors], object]


def put(part: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({NAME + part: tensor})


def edit(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({NAME + part: change(tensors[NAME + part])})


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(NAME + part)


def poke(part: str, place: int, value: float) -> Change:
    return lambda tensors: tensors[NAME + part].__setitem__(place, value)


def utf8(text: str | bytes) -> torch.Tensor:
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


def says(**fields: object) -> Change:
    """Changes fields of the JSON; a field set to `...` is left out."""

    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | fields
        tensors[STATE] = utf8(json.dumps({k: v for k, v in state.items() if v is not ...}))

    return change


def raw(text: str | bytes) -> Change:
    return put(STATE.removeprefix(NAME), utf8(text))


def no_longer_nested(tensors: Tensors) -> None:
    says(nested_offset=..., nested_blocksize=..., nested_dtype=...)(tensors)
    tensors[f"{NAME}.absmax"] = torch.ones(48)


STATE_PART = STATE.removeprefix(NAME)
FAULTS: dict[str, tuple[bool, Change, str]] = {
    # the JSON
    "no JSON": (True, drop(STATE_PART), "got none, wanted quant_state.bitsandbytes__nf4 or"),
    "nf4 and fp4": (
        True,
        put(".quant_state.bitsandbytes__fp4", utf8("{}")),
        "got quant_state.bitsandbytes__fp4, quant_state.bitsandbytes__nf4, wanted",
    ),
    "JSON not UTF-8": (True, raw(b'{"quant_type": "\xff"}'), "bytes that are not JSON ('utf-8' codec"),
    "JSON cut short": (True, edit(STATE_PART, lambda t: t[:-1]), "bytes that are not JSON"),
    "JSON empty": (True, raw(""), "bytes that are not JSON"),
    "JSON of 65 kB": (True, raw(" " * 70_000 + "{}"), "got uint8 [70002], wanted uint8, at most 65536"),
    "JSON as floats": (True, edit(STATE_PART, torch.Tensor.float), "wanted uint8"),
    "JSON nested deeply": (True, raw("[" * 60_000), "bytes that are not JSON"),
    "JSON list": (True, raw("[]"), "a JSON list, wanted an object"),
    "quant_type unknown": (True, says(quant_type="int4"), "quant_type: got 'int4', wanted 'nf4' or 'fp4'"),
    "quant_type missing": (True, says(quant_type=...), "quant_type: got nothing"),
    "quant_type a list": (True, says(quant_type=["nf4"]), "quant_type: got ['nf4']"),
    "quant_type not the key's": (True, says(quant_type="fp4"), "quant_type: got 'fp4', wanted the one in the key"),
    "key of an unknown type": (
        True,
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__int4": t.pop(STATE)}),
        "bitsandbytes__int4: quant_type: got 'nf4', wanted the one in the key",
    ),
    "blocksize 48": (True, says(blocksize=48), "blocksize: got 48, wanted one of 32, 64"),
    "blocksize 0": (True, says(blocksize=0), "blocksize: got 0"),
    "blocksize -64": (True, says(blocksize=-64), "blocksize: got -64"),
    "blocksize 64.0": (True, says(blocksize=64.0), "blocksize: got 64.0"),
    "blocksize missing": (True, says(blocksize=...), "blocksize: got nothing"),
    "blocksize not the one used": (True, says(blocksize=128), "absmax: got uint8 [48], wanted uint8 [24]"),
    "shape missing": (True, says(shape=...), "shape: got nothing, wanted [N, K]"),
    "shape null": (True, says(shape=None), "shape: got None"),
    "shape of one": (True, says(shape=[3072]), "shape: got [3072]"),
    "shape of three": (True, says(shape=[48, 64, 1]), "shape: got [48, 64, 1]"),
    "shape with 0": (True, says(shape=[0, 64]), "shape: got [0, 64]"),
    "shape negative": (True, says(shape=[-48, -64]), "shape: got [-48, -64]"),
    "shape fractional": (True, says(shape=[48.0, 64]), "shape: got [48.0, 64]"),
    "shape of true": (True, says(shape=[True, 64]), "shape: got [True, 64]"),
    "shape larger": (True, says(shape=[49, 64]), "got uint8 [1536, 1], 1536 bytes, wanted uint8 [1568, 1]"),
    "shape beyond memory": (True, says(shape=[2**62, 2**62]), "1536 bytes, wanted uint8 ["),
    "dtype unknown": (True, says(dtype="float64"), "dtype: got 'float64', wanted one of float32, float16, bfloat16"),
    "dtype missing": (True, says(dtype=...), "dtype: got nothing"),
    "dtype a number": (True, says(dtype=16), "dtype: got 16"),
    "nested_offset missing": (True, says(nested_offset=...), "nested_offset: got nothing, wanted a finite float32"),
    "nested_offset NaN": (True, says(nested_offset=float("nan")), "nested_offset: got nan"),
    "nested_offset infinite": (True, says(nested_offset=float("inf")), "nested_offset: got inf"),
    "nested_offset beyond float32": (True, says(nested_offset=1e39), "nested_offset: got 1e+39"),
    "nested_offset of 400 digits": (True, says(nested_offset=10**400), "nested_offset: got 1000"),
    "nested_offset a string": (True, says(nested_offset="0.1"), "nested_offset: got '0.1'"),
    "nested_offset true": (True, says(nested_offset=True), "nested_offset: got True"),
    "nested_blocksize 128": (True, says(nested_blocksize=128), "nested_blocksize: got 128, wanted 256"),
    "nested_blocksize missing": (True, says(nested_blocksize=...), "nested_blocksize: got nothing"),
    "nested_dtype": (True, says(nested_dtype="float16"), "nested_dtype: got 'float16', wanted float32"),
    # the codes
    "no codes": (True, drop(""), f"{NAME}: got no such tensor"),
    "codes cut short": (True, edit("", lambda t: t[:-1]), "got uint8 [1535, 1], 1535 bytes, wanted uint8 [1536, 1]"),
    "codes too long": (True, edit("", lambda t: torch.cat([t, t[:1]])), "1537 bytes, wanted uint8 [1536, 1]"),
    "codes transposed": (True, edit("", lambda t: t.T), "got uint8 [1, 1536]"),
    "codes flat": (True, edit("", lambda t: t.view(-1)), "got uint8 [1536]"),
    "codes as bool": (True, edit("", lambda t: t.bool()), "got bool [1536, 1]"),
    "codes one each": (True, edit("", lambda t: t.int()), "got int32 [1536, 1], 6144 bytes"),
    "a dense weight": (True, put("", torch.zeros(48, 64, dtype=torch.bfloat16)), "got bfloat16 [48, 64], 6144 bytes"),
    # the scales
    "no absmax": (False, drop(".absmax"), f"{NAME}.absmax: got no such tensor"),
    "absmax cut short": (False, edit(".absmax", lambda t: t[:-1]), "got float32 [47], wanted float32 [48]"),
    "absmax too long": (False, edit(".absmax", lambda t: t.repeat(2)), "got float32 [96], wanted float32 [48]"),
    "absmax float16": (False, edit(".absmax", torch.Tensor.half), "got float16 [48], wanted float32 [48]"),
    "absmax not nested": (True, put(".absmax", torch.ones(48)), "got float32 [48], wanted uint8 [48]"),
    "absmax nested, JSON not": (
        False,
        edit(".absmax", lambda t: t.byte()),
        "absmax: got uint8 [48], wanted float32 [48]",
    ),
    "nested parts, JSON without": (
        True,
        lambda t: (
            says(nested_offset=..., nested_blocksize=..., nested_dtype=...)(t),
            put(".absmax", torch.ones(48))(t),
        ),
        "nested_quant_map, wanted no such part; ",
    ),
    "JSON nested, parts not": (
        False,
        says(nested_offset=0.5, nested_blocksize=256, nested_dtype="float32"),
        "absmax: got float32 [48], wanted uint8 [48]",
    ),
    "no nested_absmax": (True, drop(".nested_absmax"), f"{NAME}.nested_absmax: got no such tensor"),
    "nested_absmax too long": (True, put(".nested_absmax", torch.ones(2)), "got float32 [2], wanted float32 [1]"),
    "nested_absmax bfloat16": (True, edit(".nested_absmax", torch.Tensor.bfloat16), "got bfloat16 [1]"),
    # the tables
    "no quant_map": (True, drop(".quant_map"), f"{NAME}.quant_map: got no such tensor"),
    "quant_map of 15": (True, edit(".quant_map", lambda t: t[:15]), "got float32 [15], wanted float32 [16]"),
    "quant_map float16": (True, edit(".quant_map", torch.Tensor.half), "got float16 [16]"),
    "quant_map other": (True, poke(".quant_map", 3, -0.4), f"at place 3, wanted {NF4[3]}"),
    "quant_map NaN": (True, poke(".quant_map", 15, float("nan")), "got nan at place 15, wanted 1.0"),
    "quant_map of fp4": (True, put(".quant_map", torch.tensor(FP4)), f"got 0.0 at place 0, wanted {NF4[0]}"),
    "no nested_quant_map": (True, drop(".nested_quant_map"), "nested_quant_map: got no such tensor"),
    "nested_quant_map other": (True, poke(".nested_quant_map", 200, 0.5), f"at place 200, wanted {DYNAMIC[200]}"),
    "nested_quant_map of 255": (True, edit(".nested_quant_map", lambda t: t[1:]), "wanted float32 [256]"),
    # anything else
    "unknown part": (True, put(".scale", torch.ones(1)), f"got {NAME}.scale, wanted no such part"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    nested, change, wanted = FAULTS[fault]
    tensors = good(nested=nested)
    from_bnb(tensors, NAME)  # it is the change that is refused
    change(tensors)
    with pytest.raises(QuantizationError) as error:
        from_bnb(tensors, NAME)
    said = str(error.value)
    assert wanted in said and said.startswith(NAME) and "\n" not in said and "got" in said and "wanted" in said, said


def test_a_table_with_a_negative_zero_is_the_same_table() -> None:
    """FP4 has a second zero; whichever sign a file gives it, it decodes to zero."""
    tensors = to_bnb(quantize(randn(4, 64), kind="fp4"), NAME)
    tensors[f"{NAME}.quant_map"][8] = -0.0
    assert from_bnb(tensors, NAME).kind == "fp4"


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    nested=st.booleans(),
)
def test_changed_bytes_of_the_json_are_refused_or_decode(edits: list[tuple[int, int]], nested: bool) -> None:
    """Whatever is accepted has parts that fit: it decodes, in the shape that the JSON now states."""
    tensors = good(nested=nested)
    state = tensors[STATE]
    for place, value in edits:
        state[place % len(state)] = value
    try:
        q = from_bnb(tensors, NAME)
    except QuantizationError as refusal:
        assert str(refusal).startswith(NAME)
        return
    assert q.numel in (3072, 3071)  # an odd count has the same number of bytes
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    assert dequantize(q, out=out).isfinite().all()


@settings(max_examples=200, deadline=None)
@given(
    part=st.sampled_from(["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]),
    length=st.integers(0, 4000),
)
def test_a_part_of_any_other_length_is_refused(part: str, length: int) -> None:
    tensors = good(nested=True)
    was = tensors[NAME + part]
    tensors[NAME + part] = torch.zeros((length, *was.shape[1:]), dtype=was.dtype)
    if length == len(was) and part in ("", ".absmax", ".nested_absmax"):
        from_bnb(tensors, NAME)
    else:
        with pytest.raises(QuantizationError):
            from_bnb(tensors, NAME)
