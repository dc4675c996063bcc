"""Saving and strict loading: every fault names its file and leaves the model as it was."""

from __future__ import annotations

import json
import os

import pytest
import torch
from qlorag.lora import (
    AdapterError,
    LoRAConfig,
    adapter_info,
    adapter_state,
    attach,
    detach,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from qlorag.lora import files as files_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NF4 = {"kind": "nf4", "block_size": 64, "double_quant": True}


@pytest.fixture
def saved(make_llama, fill_b, tmp_path):
    """A folder with an adapter on q_proj and v_proj of both blocks, r = 4, trained on the base "base-1"."""
    model = make_llama()
    attach(model, LoRAConfig(r=4, alpha=8, dropout=0.1, targets=["q_proj", "v_proj"]), seed=2)
    fill_b(model)
    save_adapter(model, tmp_path / "a", base_name="some/base", base_fingerprint="base-1", quantize=NF4)
    return tmp_path / "a", adapter_state(model)


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is KeyError:
            del config[key]
        else:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, change, metadata=None):
    tensors = load_file(folder / TENSORS)
    with safe_open(folder / TENSORS, framework="pt") as file:
        old = file.metadata()
    change(tensors)
    save_file(tensors, folder / TENSORS, old if metadata is None else metadata)


def test_round_trip(saved, make_llama):
    folder, state = saved
    model = make_llama()
    info = load_adapter(model, folder, base_fingerprint="base-1", trainable=True)
    assert info.base_verified
    assert (info.base_name, info.base_fingerprint, info.quantize) == ("some/base", "base-1", NF4)
    loaded = adapter_state(model)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    layer = model.model.layers[1].self_attn.v_proj
    assert (layer.r, layer.alpha, layer.dropout, layer.scaling) == (4, 8.0, 0.1, 2.0)
    assert [name for name, _ in trainable_parameters(model)] == [
        f"{path}.lora_{x}" for path in info.layers for x in "AB"
    ]
    assert len(info.layers) == 4


def test_info_without_a_model(saved):
    info = adapter_info(saved[0])
    assert info.quantize == NF4 and info.config.alpha == 8 and not info.base_verified


def test_files_on_disk(saved):
    folder, _ = saved
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]  # no temporary file stays
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)
    with safe_open(folder / TENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert KEY in file.keys()  # noqa: SIM118


def test_equal_adapters_are_equal_files(make_llama, tmp_path):
    """The official writer orders metadata by a hash with a random seed; 8 saves would agree by chance once in 10**6."""
    model = make_llama()
    attach(model, LoRAConfig(r=4, targets=["q_proj", "v_proj"]))
    files = set()
    for i in range(8):
        save_adapter(model, tmp_path / str(i), quantize={"kind": "nf4", "block_size": 64}, base_fingerprint="f")
        files.add((tmp_path / str(i) / TENSORS).read_bytes())
    assert len(files) == 1
    with safe_open(tmp_path / "0" / TENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "pt" and len(file.keys()) == len(adapter_state(model))


def test_target_modules_are_exact(make_llama, tmp_path):
    model = make_llama()
    attach(model, LoRAConfig(targets=["q_proj", "up_proj"], num_layers=1))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]


def test_target_modules_that_cannot_be_told_apart(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    attach(model, LoRAConfig(targets="a"))
    with pytest.raises(AdapterError, match=r"cannot tell the adapted layers from b\.a"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_exceptions_are_written_as_patterns(make_llama, tmp_path):
    model = make_llama()
    attach(model, LoRAConfig(rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 4}))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 8
    assert config["rank_pattern"] == {"down_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 4}


def test_a_bf16_adapter_is_stored_in_float32(make_llama, tmp_path):
    model = make_llama()
    attach(model, LoRAConfig(), dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {torch.float32}
    again = make_llama()
    load_adapter(again, tmp_path, dtype=torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip(adapter_state(again).values(), adapter_state(model).values(), strict=True)
    )


def test_the_models_own_fingerprint_is_used(saved, make_llama, tmp_path):
    model = make_llama()
    model.fingerprint = "base-1"
    assert load_adapter(model, saved[0]).base_verified
    detach(model)
    model.fingerprint = "base-2"
    with pytest.raises(AdapterError, match=r"fingerprint base-1, but this model's is base-2.*some/base"):
        load_adapter(model, saved[0])
    attach(model, LoRAConfig())
    save_adapter(model, tmp_path / "b")
    assert adapter_info(tmp_path / "b").base_fingerprint == "base-2"


def test_frozen_unless_trainable(saved, make_llama):
    model = make_llama()
    load_adapter(model, saved[0])
    assert not any(p.requires_grad for p in model.parameters())


def change(**values):
    return lambda folder: edit_config(folder, **values)


def drop(folder):
    edit_tensors(folder, lambda t: t.pop(KEY))


def drop_layer(folder):
    edit_tensors(folder, lambda t: [t.pop(KEY), t.pop(KEY.replace("_A", "_B"))])


def add(key, shape=(4, 32)):
    return lambda folder: edit_tensors(folder, lambda t: t.update({key: torch.zeros(shape)}))


def put(value):
    return lambda folder: edit_tensors(folder, lambda t: t.update({KEY: value}))


def poke(value):
    def change(tensors):
        tensors[KEY][1, 2] = value

    return lambda folder: edit_tensors(folder, change)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def both(key):
    return add(key), add(key.replace("_A", "_B"), (32, 4))


FAULTS = {
    # the folder
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "missing", "interrupted"]),
    "no tensors": (lambda f: (f / TENSORS).unlink(), [TENSORS, "missing"]),
    "pickle only": (
        lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
        [TENSORS, "pickle", "safetensors"],
    ),
    # the config
    "cut config": (cut(CONFIG, 50), [CONFIG, "not valid JSON"]),
    "empty config": (cut(CONFIG, 0), [CONFIG, "not valid JSON"]),
    "not UTF-8": (lambda f: (f / CONFIG).write_bytes(b"\xff{}"), [CONFIG, "utf-8"]),
    "not an object": (lambda f: (f / CONFIG).write_text("[1]"), [CONFIG, "JSON list", "object"]),
    "deep JSON": (lambda f: (f / CONFIG).write_text("[" * 100_000), [CONFIG, "not valid JSON"]),
    "other method": (change(peft_type="LOHA"), [CONFIG, "peft_type='LOHA'", "'LORA'"]),
    "no method": (change(peft_type=KeyError), [CONFIG, "peft_type=None"]),
    "no alpha": (change(lora_alpha=KeyError), [CONFIG, "lora_alpha is missing"]),
    "null alpha": (change(lora_alpha=None), [CONFIG, "lora_alpha=None"]),
    "no rank": (change(r=KeyError), [CONFIG, "r is missing"]),
    "rank is text": (change(r="4"), [CONFIG, "r='4'"]),
    "bad dropout": (change(lora_dropout=2), [CONFIG, "lora_dropout=2"]),
    "bad rslora": (change(use_rslora="yes"), [CONFIG, 'use_rslora="yes"', "true or false"]),
    "bad pattern": (change(rank_pattern=[1]), [CONFIG, "rank_pattern=[1]"]),
    "bad pattern regex": (change(rank_pattern={"(": 4}), [CONFIG, "rank_pattern='('"]),
    "no targets": (change(target_modules=None), [CONFIG, "target_modules=null"]),
    "bad targets": (change(target_modules=[1]), [CONFIG, "target_modules=[1]"]),
    "bad target regex": (change(target_modules="("), [CONFIG, "targets='('"]),
    "bad block pattern": (change(layers_to_transform=[0], layers_pattern="("), [CONFIG, "layers_pattern='('"]),
    "bad blocks": (change(layers_to_transform=["x"]), [CONFIG, 'layers_to_transform=["x"]']),
    # features that change what the tensors mean
    "DoRA": (change(use_dora=True), [CONFIG, "use_dora=true is not supported"]),
    "bias": (change(bias="all"), [CONFIG, 'bias="all" is not supported, only "none"']),
    "lora_bias": (change(lora_bias=True), [CONFIG, "lora_bias=true"]),
    "modules_to_save": (change(modules_to_save=["lm_head"]), [CONFIG, 'modules_to_save=["lm_head"]']),
    "tokens": (change(trainable_token_indices=[1, 2]), [CONFIG, "trainable_token_indices=[1, 2]"]),
    "aLoRA": (change(alora_invocation_tokens=[1]), [CONFIG, "alora_invocation_tokens=[1]"]),
    "replication": (change(layer_replication=[[0, 1]]), [CONFIG, "layer_replication=[[0, 1]]"]),
    "transposed": (change(fan_in_fan_out=True), [CONFIG, "fan_in_fan_out=true"]),
    "parameters": (change(target_parameters=["w"]), [CONFIG, 'target_parameters=["w"]']),
    "QALoRA": (change(use_qalora=True), [CONFIG, "use_qalora=true"]),
    "PiSSA": (change(init_lora_weights="pissa"), [CONFIG, 'init_lora_weights="pissa"', "base's weights"]),
    "unknown flag": (change(use_qora=True), [CONFIG, "use_qora=true is not known"]),
    "unknown setting": (change(new_config={"a": 1}), [CONFIG, "new_config=", "not known"]),
    # the tensors
    "cut tensors": (cut(TENSORS, -100), [TENSORS, "cut off or damaged"]),
    "cut header": (cut(TENSORS, 20), [TENSORS, "cut off or damaged"]),
    "empty tensors": (cut(TENSORS, 0), [TENSORS, "cut off or damaged"]),
    "no tensor at all": (lambda f: edit_tensors(f, dict.clear), [TENSORS, "holds no tensor"]),
    "missing half": (drop, [TENSORS, KEY, "is missing"]),
    "missing layer": (drop_layer, [TENSORS, "missing " + KEY, "target_modules asks for"]),
    "adapter name in key": (
        add(KEY.replace(".weight", ".default.weight")),
        [TENSORS, "unexpected", "lora_A.default"],
    ),
    "unknown tensor": (
        add("base_model.model.lm_head.weight"),
        [TENSORS, "unexpected tensor base_model.model.lm_head"],
    ),
    "another base weight": (
        add(KEY.replace("lora_A", "base_layer"), (32, 32)),
        [TENSORS, KEY.replace("lora_A", "base_layer"), "is not model.layers.0.self_attn.q_proj.weight", "trained"],
    ),
    "a resized base weight": (
        add(KEY.replace("lora_A", "base_layer"), (33, 32)),
        [TENSORS, "[33, 32]", "[32, 32]", "resized"],
    ),
    "base weight of no layer": (
        add("base_model.model.lm_head.base_layer.weight"),
        [TENSORS, "unexpected tensor base_model.model.lm_head.base_layer.weight", "no lora_A for lm_head"],
    ),
    "mlx-lm's names": (
        add("model.layers.0.self_attn.q_proj.lora_a"),
        [TENSORS, "q_proj.lora_a: this is an adapter of mlx-lm", "mlx_lm.fuse"],
    ),
    "wrong prefix": (add("model.layers.0.x.lora_A.weight"), [TENSORS, "unexpected tensor model.layers.0.x"]),
    "magnitude": (
        add(KEY.replace("lora_A.weight", "lora_magnitude_vector")),
        [TENSORS, "lora_magnitude_vector"],
    ),
    "wrong rank": (put(torch.zeros(5, 32)), [TENSORS, KEY, "rank 5", "r=4"]),
    "wrong width": (put(torch.zeros(4, 31)), [TENSORS, KEY, "[4, 31]", "[4, 32]"]),
    "not a matrix": (put(torch.zeros(4)), [TENSORS, KEY, "[4]", "matrix"]),
    "integers": (put(torch.zeros(4, 32, dtype=torch.int32)), [TENSORS, KEY, "int32"]),
    "NaN": (poke(float("nan")), [TENSORS, KEY, "NaN"]),
    "infinity": (poke(float("inf")), [TENSORS, KEY, "infinity"]),
    # the two files against each other, and against the model
    "rank edited": (change(r=8), [CONFIG, "r=8", "saved with 4"]),
    "alpha edited": (change(lora_alpha=64), [CONFIG, "lora_alpha=64", "saved with 8"]),
    "rslora edited": (change(use_rslora=True), [CONFIG, "use_rslora=True", "saved with False"]),
    "targets edited": (
        change(target_modules=["q_proj"]),
        [TENSORS, "unexpected", "v_proj", "target_modules"],
    ),
    "excluded": (change(exclude_modules=["v_proj"]), [TENSORS, "unexpected", "v_proj"]),
    "other blocks": (change(layers_to_transform=[0]), [TENSORS, "unexpected", "layers.1.self_attn.q_proj"]),
    "more targets": (change(target_modules=["q_proj", "v_proj", "k_proj"]), [TENSORS, "missing", "k_proj"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(saved, make_llama, ids, fault):
    folder, _ = saved
    damage, named = FAULTS[fault]
    damage(folder)
    model = make_llama()
    modules = dict(model.named_modules())
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder, base_fingerprint="base-1")
    message = str(error.value)
    for text in named:
        assert text in message, message
    assert "\n" not in message
    assert str(folder) in message
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["adapters.safetensors", "0000100_adapters.safetensors"])
def test_an_adapter_of_mlx_lm_is_named_as_such(llama, tmp_path, name):
    (tmp_path / CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8}})
    )
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(32, 8)}, tmp_path / name)
    with pytest.raises(
        AdapterError, match=rf"{name}: this is an adapter of mlx-lm .* which is not read: merge it there"
    ):
        load_adapter(llama, tmp_path)


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"block_size": 64}, "has no kind, want kind, block_size, double_quant"),
        ({"kind": "nf4", "surprise": 1}, "has surprise=1, want only kind, block_size, double_quant"),
        ({"kind": "nf4", "dtype": "bfloat16"}, "has dtype='bfloat16', want only"),
        ({"kind": 4}, "has kind=4, want str"),
        ({"kind": "nf4", "block_size": "64"}, "has block_size='64', want int"),
        ({"kind": "nf4", "block_size": True}, "has block_size=True, want int"),
        ({"kind": "nf4", "double_quant": 1}, "has double_quant=1, want bool"),
    ],
)
def test_what_the_file_says_of_its_bases_quantization_is_checked(make_llama, tmp_path, quantize, message):
    model = make_llama()
    attach(model, LoRAConfig())
    save_adapter(model, tmp_path, quantize=quantize)
    with pytest.raises(AdapterError, match=f"{TENSORS}: metadata qlorag.base_quantize {message}"):
        adapter_info(tmp_path)


def test_no_folder(llama, tmp_path):
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        load_adapter(llama, tmp_path / "nowhere")


def test_other_model(saved, make_llama):
    """Fewer blocks than the adapter has, and no fingerprint to tell."""
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj.*no such linear layer.*q_proj \(1\)"):
        load_adapter(make_llama(layers=1), saved[0])


def test_a_second_adapter_is_refused(saved, make_llama):
    model = make_llama()
    load_adapter(model, saved[0])
    with pytest.raises(AdapterError, match="already carries LoRA"):
        load_adapter(model, saved[0])


def test_nothing_to_save(llama, tmp_path):
    with pytest.raises(AdapterError, match="no LoRA layer"):
        save_adapter(llama, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "keys", [{"brand_new_flag": False}, {"brand_new_size": 16}, {"brand_new_name": "x"}, {"note": None}]
)
def test_unknown_keys_that_are_off_are_let_pass(saved, make_llama, keys):
    folder, state = saved
    edit_config(folder, **keys)
    model = make_llama()
    load_adapter(model, folder)
    assert all(torch.equal(adapter_state(model)[key], state[key]) for key in state)


def test_missing_keys_have_pefts_defaults(saved, make_llama):
    """An old file with the few fields that LoRA began with."""
    folder, state = saved
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    edit_tensors(folder, lambda t: None, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(minimal))
    model = make_llama()
    info = load_adapter(model, folder, base_fingerprint="base-1")
    assert info.base_fingerprint is None and not info.base_verified
    assert all(torch.equal(adapter_state(model)[key], state[key]) for key in state)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_interrupted_save(saved, make_llama, fill_b, tmp_path, monkeypatch, step, nth, again):
    """A save that dies at any step: the old adapter or the new one or a refusal, never a mixture."""
    folder = saved[0] if again else tmp_path / "new"
    old = adapter_state(loaded(make_llama, saved[0])) if again else None
    model = make_llama()
    attach(model, LoRAConfig(r=4, alpha=32, targets=["q_proj", "v_proj"]), seed=9)
    fill_b(model, 9)
    calls = 0

    def dying(real):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    if step == "write":
        real = files_module._write
        monkeypatch.setattr(files_module, "_write", dying(real))
    else:
        monkeypatch.setattr(os, step, dying(getattr(os, step)))
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, folder)
    monkeypatch.undo()
    if folder.exists():
        assert set(os.listdir(folder)) <= {CONFIG, TENSORS}
    try:
        state = adapter_state(loaded(make_llama, folder))
    except AdapterError as error:
        assert any(text in str(error) for text in ("interrupted", "no such folder", "saved with 32"))
    else:
        assert old is not None and all(torch.equal(state[key], old[key]) for key in old)


def loaded(make_llama, folder):
    model = make_llama()
    load_adapter(model, folder)
    return model
