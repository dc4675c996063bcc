"""Folders in bitsandbytes' 4 bits: theirs load here and ours load there, with the same bits; damaged ones do not.

bitsandbytes is asked only where its CPU code is right: rows that are a multiple of the block size, and models in train
mode, since its inference path on some processors rounds the scales and then saves them so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.kernels.nf4 import fused_rows
from qlorag.lora import LoRAConfig, attach, to_dense
from qlorag.models import (
    Checkpoint,
    ConfigError,
    Decoder,
    ModelError,
    WeightsError,
    decoder_config,
    load_model,
    save_model,
    save_quantized,
)
from qlorag.quant import QuantizedLinear
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.isa

UP = "model.layers.0.mlp.up_proj.weight"
IDS = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def layers(model: Decoder) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def densified(folder: Path) -> Decoder:
    """The model with every 4-bit layer decoded to float32 and dense."""
    model = load_model(folder, dtype=torch.float32)
    for path, layer in layers(model).items():
        model.set_submodule(path, to_dense(layer, torch.float32))
    return model


def their_layers(model: Any) -> dict[str, Any]:
    import bitsandbytes

    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def their_weight(layer: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    assert layer.training and layer.in_features % layer.weight.blocksize == 0  # where it is an authority
    decoded: torch.Tensor = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return decoded


def load_theirs(folder: Path, **options: Any) -> Any:
    """In train mode, before anything ran: in eval mode the first product would repack the weights."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()


def save_theirs(
    folder: Path, *, kind: str = "nf4", double: bool = True, block_size: int = 64, shard: str = "1GB",
    storage: torch.dtype = torch.uint8, family: str = "llama", dtype: torch.dtype = torch.bfloat16,
) -> Any:  # fmt: skip
    """A random model quantized and saved by transformers and bitsandbytes; returned in train mode."""
    import bitsandbytes
    import transformers

    torch.manual_seed(0)
    configs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    config = configs[family](**SIZES, tie_word_embeddings=family == "qwen2", initializer_range=0.1)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    dense.save_pretrained(folder / "dense")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = load_theirs(folder / "dense", quantization_config=quantization, dtype=dtype)
    if block_size != 64:  # the configuration has no name for it, the files do
        for name, layer in their_layers(model).items():
            layer.weight = bitsandbytes.nn.Params4bit(
                dense.get_submodule(name).weight.data, requires_grad=False, blocksize=block_size, quant_type=kind,
                compress_statistics=double, quant_storage=storage, module=layer,
            ).to("cpu")  # fmt: skip
    model.save_pretrained(folder / "theirs", max_shard_size=shard)
    return model


# Theirs, here.


@pytest.mark.oracle
@pytest.mark.parametrize("block_size", [64, 32, 256])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_their_folder_loads_with_their_bits(kind: str, double: bool, block_size: int, tmp_path: Path) -> None:
    theirs = save_theirs(tmp_path, kind=kind, double=double, block_size=block_size)
    folder = tmp_path / "theirs"
    ours = load_model(folder, dtype=torch.bfloat16)
    assert layers(ours).keys() == their_layers(theirs).keys() and len(layers(ours)) == 14
    for name, layer in their_layers(theirs).items():
        mine = ours.get_submodule(name)
        assert isinstance(mine, QuantizedLinear)
        assert (mine.kind, mine.block_size, mine.quantized.double_quant) == (kind, block_size, double)
        assert torch.equal(mine.dequantize(), their_weight(layer)), name
    stored = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, stored[name]), name  # embedding, norms, head
    # Written again from here, it is the same file to the last byte.
    again = save_quantized(ours, tmp_path / "again", source=folder)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    wanted, got = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, again))
    assert got == wanted | {"bnb_4bit_compute_dtype": "bfloat16"}  # the one thing that save_quantized decides


@torch.no_grad()
@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_of_their_folder(family: str, tmp_path: Path) -> None:
    """Equal to the decoded model's here, and to theirs up to the rounding of float32 sums in another order."""
    save_theirs(tmp_path, family=family, dtype=torch.float32)
    folder = tmp_path / "theirs"
    ours = load_model(folder, dtype=torch.float32)
    biased = [name for name, layer in layers(ours).items() if layer.bias is not None]
    assert len(layers(ours)) == 14 and len(biased) == (6 if family == "qwen2" else 0)
    many = IDS.repeat(2, 1)  # so many rows that W is decoded, then multiplied as the dense weight is
    assert many.numel() > fused_rows(torch.float32, torch.device("cpu"))
    logits = ours(many)
    assert torch.equal(logits, densified(folder)(many))
    logits = logits[: len(IDS)]
    one = ours(IDS[:, :1])  # 1 row: taken straight from the packed weight, in another order of summation
    torch.testing.assert_close(one, logits[:, :1], atol=1e-4, rtol=1e-4)
    theirs = load_theirs(folder)
    torch.testing.assert_close(logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.1  # the comparison is of something


@pytest.mark.oracle
def test_shards_and_another_quant_storage(tmp_path: Path) -> None:
    """The parts of one weight may lie in different shards, and its codes under the dtype that FSDP wants."""
    theirs = save_theirs(tmp_path, shard="100KB", storage=torch.bfloat16)
    folder = tmp_path / "theirs"
    checkpoint = Checkpoint(folder)
    assert len({checkpoint.file(name) for name in checkpoint.names()}) > 5 and checkpoint.dtype(UP) == "BF16"
    ours = load_model(folder)
    for name, layer in their_layers(theirs).items():
        assert torch.equal(ours.get_submodule(name).dequantize(), their_weight(layer))


# Ours, there.


def random_folder(folder: Path, **changes: Any) -> Path:
    """A random dense model of ours in float32."""
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, "tie_word_embeddings": True} | changes
    torch.manual_seed(2)
    model = Decoder(decoder_config(raw))
    weights = {name: p.detach() * 0.2 for name, p in model.named_parameters()}  # a tied head is named once
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.oracle
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"quantize": "nf4"}),
        ({"tie_word_embeddings": False}, {"quantize": "nf4", "double_quant": False, "block_size": 32}),
        ({}, {"quantize": "fp4", "block_size": 256}),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            {"quantize": "fp4", "double_quant": False},
        ),
    ],
    ids=["nf4 tied", "nf4 single 32", "fp4 256", "qwen2 with biases"],
)
def test_our_folder_loads_with_our_bits(changes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    source = random_folder(tmp_path / "dense", **changes)
    ours = load_model(source, dtype=torch.float32, **options)
    folder = save_quantized(ours, tmp_path / "ours", source=source, dtype=torch.float32)
    assert Checkpoint(folder).dtype("model.embed_tokens.weight") == "F32"
    theirs = load_theirs(folder)
    assert their_layers(theirs).keys() == layers(ours).keys()
    for name, layer in their_layers(theirs).items():
        assert torch.equal(their_weight(layer), ours.get_submodule(name).dequantize()), name
        assert layer.weight.quant_state.nested is ours.get_submodule(name).quantized.double_quant
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), atol=1e-4, rtol=1e-4)
    back = load_model(folder, dtype=torch.float32)
    assert torch.equal(back(IDS), ours(IDS))


@torch.no_grad()
@pytest.mark.oracle
def test_a_projection_that_stays_dense_stays_dense_there(tmp_path: Path) -> None:
    source = random_folder(tmp_path / "dense")
    ours = load_model(source, quantize="nf4", dtype=torch.float32)
    kept = "model.layers.1.mlp.down_proj"
    weight = load_model(source, dtype=torch.float32).get_submodule(kept).weight
    ours.set_submodule(kept, to_dense(ours.get_submodule(kept), torch.float32))
    ours.get_submodule(kept).weight = weight
    folder = save_quantized(ours, tmp_path / "ours", source=source, dtype=torch.float32)
    theirs, back = load_theirs(folder), load_model(folder, dtype=torch.float32, quantize="nf4")
    assert their_layers(theirs).keys() == layers(back).keys() == layers(ours).keys() and len(layers(ours)) == 13
    for model in (theirs, back):
        assert torch.equal(model.get_submodule(kept).weight, weight)
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def smollm2_nf4(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_model(smollm2_dir, quantize="nf4")
    return save_quantized(model, tmp_path_factory.mktemp("smollm2") / "nf4", source=smollm2_dir)


@pytest.mark.model
@pytest.mark.oracle
def test_a_real_model_there(smollm2_nf4: Path) -> None:
    """All 210 projections of SmolLM2 decode to the same bits; its rows are whole blocks, so bitsandbytes is right."""
    ours, theirs = load_model(smollm2_nf4), load_theirs(smollm2_nf4)
    there = their_layers(theirs)
    assert len(there) == 210 and there.keys() == layers(ours).keys()
    for name, layer in there.items():
        assert torch.equal(their_weight(layer), ours.get_submodule(name).dequantize()), name
    dense = dict(theirs.named_parameters())
    assert all(torch.equal(p, dense[name]) for name, p in ours.named_parameters())


CHILD = """
import json, sys, torch
from qlorag.models import load_model
from qlorag.quant import QuantizedLinear
import qlorag.models.files.load

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("VmHWM")).split()[1])

def quantize(*args, **options):
    raise AssertionError("quantized again")

qlorag.models.files.load.quantize_tensor = quantize
before = peak()
model = load_model(sys.argv[1])
rise = peak() - before
held = sum(p.nbytes for p in model.parameters()) + sum(
    m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
oracles = [m for m in ("bitsandbytes", "transformers", "accelerate") if m in sys.modules]
print(json.dumps({"rise": rise, "held": held, "oracles": oracles}))
"""


@pytest.mark.model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM")
def test_loading_holds_the_model_and_nothing_else(smollm2_nf4: Path) -> None:
    """No second copy and no decoded weight: 111 MB stay, and the peak is above them by torch's first allocations."""
    run = subprocess.run([sys.executable, "-c", CHILD, str(smollm2_nf4)], capture_output=True, text=True, check=True)
    seen = json.loads(run.stdout)
    assert seen["oracles"] == []
    assert 110e6 < seen["held"] < 113e6
    assert seen["rise"] < seen["held"] + 30e6, seen


# What a folder may say.


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours in nf4 with float32 around it; nothing but this project made it."""
    root = tmp_path_factory.mktemp("packed")
    source = random_folder(root / "dense")
    model = load_model(source, quantize="nf4", dtype=torch.float32)
    return save_quantized(model, root / "nf4", source=source, dtype=torch.float32)


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_asking_for_what_is_there_changes_nothing(packed_dir: Path) -> None:
    for options in ({"quantize": "nf4"}, {"quantize": "nf4", "block_size": 128, "double_quant": False}):
        model = load_model(packed_dir, dtype=torch.float32, **options)
        assert all(m.block_size == 64 and m.quantized.double_quant for m in layers(model).values())
        assert torch.equal(model(IDS), load_model(packed_dir, dtype=torch.float32)(IDS))
    with pytest.raises(ConfigError, match=r"quantize='fp4', but model.* is stored as nf4: leave quantize out"):
        load_model(packed_dir, quantize="fp4")


@pytest.mark.parametrize(
    "section",
    [{"load_in_4bit": True}, {"quant_method": "bitsandbytes", "_load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
                              "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": "bfloat16"}],
    ids=["as old versions wrote it", "contradicts the tensors"],
)  # fmt: skip
def test_each_tensor_speaks_for_itself(section: dict[str, Any], packed_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    change_config(folder, lambda raw: raw.update(quantization_config=section))
    assert torch.equal(load_model(folder)(IDS), load_model(packed_dir)(IDS))


def test_a_model_loaded_in_inference_mode_can_be_trained(packed_dir: Path) -> None:
    with torch.inference_mode():
        model = load_model(packed_dir, dtype=torch.float32)
    attach(model, LoRAConfig())
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (["lm_head", "model.layers.0.mlp"], "names 'model.layers.0.mlp', but model.layers.0.mlp"),
        (["up_proj"], r"names 'up_proj', but model.layers.\d.mlp.up_proj.weight is stored in 4 bits"),
        (["model.layers.1.self_attn.q_proj"], "names '.*', but model.layers.1.self_attn.q_proj.weight is stored"),
        ("lm_head", "='lm_head', wanted a list of module names, or null"),
        ([1], r"=\[1\], wanted a list"),
    ],
)
def test_the_list_of_skipped_modules_is_checked(
    skipped: object, message: str, packed_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    change_config(folder, lambda raw: raw["quantization_config"].update(llm_int8_skip_modules=skipped))
    with pytest.raises(ConfigError, match=rf"config.json: quantization_config.llm_int8_skip_modules ?{message}"):
        load_model(folder)
    # Names of other modules, as other programs list them; "model.layers.1" is not the beginning of layer 10.
    change_config(folder, lambda raw: raw["quantization_config"].update(llm_int8_skip_modules=["lm_head", "vision"]))
    assert torch.equal(load_model(folder)(IDS), load_model(packed_dir)(IDS))


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "(bitsandbytes in 8 bits)"),
        ({"load_in_8bit": True}, "in 8 bits)"),
        ({"quant_method": "bitsandbytes"}, "(bitsandbytes)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": "yes"}, "(bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 4}, "(gptq)"),
        ({"quant_method": "awq", "load_in_4bit": True}, "(awq)"),
        ({"quant_method": ["x\n", {}]}, "already quantized"),
        ({}, "(None)"),
    ],
)
def test_other_quantizations_are_refused(section: dict[str, Any], what: str, packed_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    change_config(folder, lambda raw: raw.update(quantization_config=section))
    with pytest.raises(ConfigError) as error:
        load_model(folder)
    said = str(error.value)
    assert what in said and "config.json: the weights are already quantized" in said and "\n" not in said
    assert "only bitsandbytes' 4 bits are read here" in said


def replace_json(tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    key = f"{UP}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | fields
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def head_in_4_bits(tensors: dict[str, torch.Tensor]) -> None:
    parts = {key.replace(UP, "model.embed_tokens.weight"): t for key, t in tensors.items() if key.startswith(UP)}
    tensors.update({key: t.clone() for key, t in parts.items()})


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "JSON missing": (lambda t: t.pop(f"{UP}.quant_state.bitsandbytes__nf4"), f"{UP}: got none, wanted quant_state"),
    "JSON of another layer": (
        lambda t: replace_json(t, shape=[256, 512]),
        "has shape [256, 512], config.json makes it",
    ),
    "JSON damaged": (lambda t: replace_json(t, blocksize=63), "blocksize: got 63, wanted one of 32"),
    "codes missing": (lambda t: t.pop(UP), f"holds {UP}.absmax but no {UP}"),
    "codes cut short": (lambda t: t.update({UP: t[UP][:-8]}), f"{UP}: got uint8 [65528, 1], 65528 bytes, wanted"),
    "absmax cut short": (
        lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:-1]}),
        f"{UP}.absmax: got uint8 [2047], wanted uint8 [2048]",
    ),
    "absmax missing": (lambda t: t.pop(f"{UP}.absmax"), f"{UP}.absmax: got no such tensor"),
    "stray part": (lambda t: t.update({f"{UP}.scale": torch.ones(1)}), f"unexpected {UP}.scale"),
    "stray weight": (
        lambda t: t.update({k.replace("layers.0", "layers.5"): v.clone() for k, v in t.items() if k.startswith(UP)}),
        "unexpected model.layers.5.mlp.up_proj.weight:",
    ),
    "embedding in 4 bits": (head_in_4_bits, "model.embed_tokens.weight is stored in 4 bits, wanted only projections"),
    "codes without anything": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{UP}.")],
        f"{UP} has shape [65536, 1], config.json makes it [512, 256]",
    ),
    "nothing in 4 bits": (
        lambda t: [t.pop(k) for k in list(t) if "_proj.weight." in k],
        "config.json says 4-bit bitsandbytes, but no tensor is stored so",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage: str, packed_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    change, wanted = DAMAGES[damage]
    change_tensors(folder, change)
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    said = str(error.value)
    assert wanted in said and str(folder) in said and "\n" not in said


def test_without_its_configuration_nothing_is_guessed(packed_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    change_config(folder, lambda raw: raw.pop("quantization_config"))
    with pytest.raises(WeightsError, match=r"unexpected model\.layers\.0\.mlp\.down_proj\.weight\.absmax"):
        load_model(folder)


def test_check_finite_looks_at_scales(packed_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_dir, tmp_path / "copy"))
    load_model(folder, check_finite=True)
    change_tensors(folder, lambda t: t[f"{UP}.nested_absmax"].__setitem__(3, float("nan")))
    load_model(folder)
    with pytest.raises(WeightsError, match=rf"{UP} has 1 NaN or infinite scales of 8"):
        load_model(folder, check_finite=True)


# Saving.


def test_what_cannot_be_saved_in_4_bits(packed_dir: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", packed_dir.parent / "dense"

    def refused(model: Decoder, wanted: str) -> None:
        with pytest.raises(ModelError, match=wanted):
            save_quantized(model, out, source=source)
        assert list(tmp_path.iterdir()) == []

    refused(load_model(source), "no layer of the model is in 4 bits: load it with quantize")
    model = load_model(packed_dir)
    attach(model, LoRAConfig(r=2))
    refused(model, "detach or merge the adapter first")
    model = load_model(packed_dir)
    model.lm_head = QuantizedLinear.from_linear(model.lm_head)  # type: ignore[assignment]
    refused(model, "lm_head is in 4 bits, wanted only projections")
    with pytest.raises(WeightsError, match="not empty"):
        save_quantized(load_model(packed_dir), packed_dir, source=source)


def test_a_dense_copy_of_a_4_bit_folder_does_not_say_4_bits(packed_dir: Path, tmp_path: Path) -> None:
    model = densified(packed_dir)
    out = save_model(model, tmp_path / "out", source=packed_dir, dtype=torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(load_model(out, dtype=torch.float32)(IDS), model(IDS))


def test_companions_come_along(tiny_dir: Path, tmp_path: Path) -> None:
    out = save_quantized(load_model(tiny_dir, quantize="nf4"), tmp_path / "out", source=tiny_dir)
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_dir.iterdir()}
    assert (out / "tokenizer.json").read_bytes() == (tiny_dir / "tokenizer.json").read_bytes()
