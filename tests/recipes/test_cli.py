"""The command line as a user types it: every verb on small real files, JSON output, config files, one-line errors."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from qlorag.models import load_model
from qlorag.recipes.cli.display import Display
from qlorag.recipes.cli.main import _parse, main
from qlorag.recipes.errors import RecipeError

ITERS = 200  # at this rate the loss falls to about 0.001: each answer is certain
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ and an adapter trained on the last two blocks of a 4-bit base."""
    root = tmp_path_factory.mktemp("trained")
    (root / "data").mkdir()
    rows = [{"prompt": f"say {w}", "completion": w} for w in ("yes", "no", "maybe")]
    for name in ("train", "test"):
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = ["train", "--model", str(tiny_dir), "--data", str(root / "data"), "--quantize", "nf4", "--iters", str(ITERS),
           "--batch-size", "3", "--learning-rate", "0.005", "--adapter-path", str(root / "adapter"), "--rank", "16",
           "--lora-layers", "2", "--dtype", "float32", "--steps-per-report", "0"]  # fmt: skip
    assert main(run) == 0
    return root


def said(capsys: Capture, status: int, *argv: object) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == status, capsys.readouterr()
    out = capsys.readouterr()
    return out.out, out.err


def result(capsys: Capture, *argv: object) -> dict[str, Any]:
    """Runs with --json: standard output must be one JSON document and nothing else."""
    out, _ = said(capsys, 0, *argv, "--json")
    value: dict[str, Any] = json.loads(out)
    return value


def test_train_wrote_what_it_promises(trained: Path) -> None:
    names = {p.name for p in (trained / "adapter").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert names == adapter | {"metrics.jsonl", "loss.png", "checkpoints", "run.json", ".run.lock"}
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 16 and all(".layers.0." not in t for t in config["target_modules"])


def test_evaluate(trained: Path, tiny_dir: Path, capsys: Capture) -> None:
    flags = ("evaluate", "--model", tiny_dir, "--data", trained / "data", "--dtype", "float32", "--max-tokens", 8)
    base = result(capsys, *flags)
    tuned = result(capsys, *flags, "--adapter-path", trained / "adapter")
    assert tuned["loss"] < 0.01 < 1 < base["loss"]
    assert tuned["perplexity"] == pytest.approx(2.718281828 ** tuned["loss"], rel=1e-6)
    assert base["exact_match"] == 0 and tuned["exact_match"] == 1
    assert [a["got"] for a in tuned["answers"]] == ["yes", "no", "maybe"]
    out, _ = said(capsys, 0, *flags)
    assert "answers that differ (3)" in out and "perplexity" in out


def test_generate_prints_text_and_numbers(trained: Path, tiny_dir: Path, capsys: Capture) -> None:
    flags = ("generate", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--dtype", "float32",
             "--prompt", "say maybe", "--max-tokens", 9)  # fmt: skip
    out, err = said(capsys, 0, *flags)
    assert out == "maybe\n"  # `> file` holds the answer and nothing else
    assert err.startswith("==========\nPrompt: ")
    assert "Generation: " in err and "tokens-per-sec" in err and "Peak memory: " in err
    assert result(capsys, *flags)["text"] == "maybe"
    sampled = [result(capsys, *flags, "--temp", 5, "--seed", s)["text"] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_reads_standard_input(
    trained: Path, tiny_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say yes"))
    out, _ = said(capsys, 0, "generate", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--prompt", "-",
                  "--dtype", "float32")  # fmt: skip
    assert out.startswith("yes\n")


def test_chat_keeps_the_conversation(
    trained: Path, tiny_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say no\n/reset\n\nsay yes\n"))
    value = result(capsys, "chat", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--dtype", "float32")
    assert [m["content"] for m in value["messages"]] == ["say yes", "yes"]


def test_an_interrupted_line_does_not_end_the_conversation(
    trained: Path, tiny_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer may end just before the ctrl-C that was meant for it."""
    typed = iter(["say no", KeyboardInterrupt(), "say yes", EOFError()])

    def typing(_: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typing)
    run = ("chat", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--dtype", "float32")
    out, _ = said(capsys, 0, *run)
    assert "no\n\n(/exit or ctrl-D ends)\n" in out
    assert next(typed, None) is None  # every line was asked for


def test_an_answer_that_failed_is_not_kept(
    trained: Path, tiny_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlorag.models import ModelError
    from qlorag.models.decoder import generate

    def fail(*_: object) -> None:
        raise ModelError("the logits are NaN")

    monkeypatch.setattr("sys.stdin", io.StringIO("say no\n"))
    monkeypatch.setattr(generate.Generation, "_tokens", fail)
    value = result(capsys, "chat", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--dtype", "float32")
    assert value["messages"] == []


def test_fuse_then_the_folder_alone(trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    """From the 4-bit base: the fused folder answers as the adapter did, here and in transformers."""
    out = tmp_path / "fused"
    flags = ("fuse", "--model", tiny_dir, "--adapter-path", trained / "adapter", "--save-path", out)
    value = result(capsys, *flags, "--dtype", "float32", "--de-quantize")
    assert value["quantize"] == "nf4" and len(value["layers"]) == 14
    answer = result(capsys, "generate", "--model", out, "--prompt", "say maybe", "--dtype", "float32")
    assert answer["text"] == "maybe"
    from qlorag.recipes.hub.assemble import assemble

    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        adapted = assemble(str(tiny_dir), adapter_path=str(trained / "adapter"), dtype="float32").model(ids)
        # W + s B A is formed once in float32 instead of two products: rounding only
        torch.testing.assert_close(load_model(out, dtype=torch.float32)(ids), adapted, atol=1e-4, rtol=1e-4)
    _, err = said(capsys, 1, *flags)
    assert "already there and not empty" in err


@pytest.mark.oracle
def test_peft_applies_our_adapter(trained: Path, tiny_dir: Path, capsys: Capture) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained / "adapter")
    from qlorag.recipes.hub.assemble import assemble

    ids = torch.tensor([[1, 50, 60, 70]])
    ours = assemble(str(tiny_dir), adapter_path=str(trained / "adapter"), quantize="none", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_inspect_says_what_each_folder_is(trained: Path, tiny_dir: Path, capsys: Capture) -> None:
    model = result(capsys, "inspect", tiny_dir)
    assert model["kind"] == "model" and model["dtypes"] == {"F32": model["parameters"]}
    adapter = result(capsys, "inspect", trained / "adapter")
    assert adapter["kind"] == "adapter" and adapter["r"] == 16 and adapter["quantize"]["kind"] == "nf4"
    assert adapter["base_fingerprint"] == model["fingerprint"]
    data = result(capsys, "inspect", trained / "data", "--model", tiny_dir)
    assert data["files"]["train.jsonl"]["rows"] == 3 and data["files"]["train.jsonl"]["trained_tokens"] > 0
    out, _ = said(capsys, 0, "inspect", tiny_dir)
    assert "3 layers, width 64, 4 heads over 2 KV heads" in out


def test_inspect_lists_the_backends_of_every_operation(capsys: Capture) -> None:
    backends = result(capsys, "inspect", "--backends")["backends"]
    kernels = Path(__file__).parents[2] / "kernels"
    assert {b["operation"].split(".")[0] for b in backends} == {p.parent.name for p in kernels.glob("*/reference.py")}
    gpu = torch.cuda.is_available()
    assert {b["detail"] for b in backends if b["backend"] == "triton"} == {
        "on tensors of the GPU" if gpu else "no GPU: torch.cuda.is_available() is False"
    }
    for b in backends:  # what C runs depends on the processor and on a compiler; the others do not
        assert b["detail"], b
        if b["backend"] != "c":
            assert b["available"] == (gpu if b["backend"] == "triton" else True), b
    plain = {b["operation"] for b in backends if b["backend"] in ("reference", "torch")}
    assert plain == {b["operation"] for b in backends}  # each runs everywhere
    c = {b["operation"]: (b["available"], b["detail"]) for b in backends if b["backend"] == "c"}
    assert c["nf4.quantize"] == c["nf4.dequantize"] == c["nf4.matmul"]
    assert c["nf4.matmul"][0] or not c["nf4.matmul_backward"][0]  # the same library with AMX on top
    out, _ = said(capsys, 0, "inspect", "--backends")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    words = {True: "yes", False: "no"}
    assert rows == [[b["operation"], b["backend"], words[b["available"]], b["detail"]] for b in backends]


@pytest.mark.slow
def test_inspecting_backends_without_a_gpu_imports_no_triton() -> None:
    code = (
        "import sys\nfrom qlorag.recipes.cli import main\nassert main(['inspect', '--backends']) == 0\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)


def test_show_mask(trained: Path, tiny_dir: Path, capsys: Capture) -> None:
    out, _ = said(capsys, 0, "train", "--model", tiny_dir, "--data", trained / "data", "--show-mask")
    assert out == "<|im_start|>user\nsay yes<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n\n"


def test_config_file_and_flags_over_it(trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tiny_dir}\nadapter_path: {trained / 'adapter'}\nprompt: say no\n"
        "max-tokens: 9\nraw: false\ndtype: float32\n"
    )
    assert result(capsys, "generate", "--config", config)["text"] == "no"
    assert result(capsys, "generate", "--config", config, "--prompt", "say yes")["text"] == "yes"
    config.write_text("- a\n")
    assert "holds a list" in said(capsys, 1, "generate", "--config", config)[1]
    config.write_text("a: b: c\n")
    assert "not YAML" in said(capsys, 1, "generate", "--config", config)[1]
    assert "cannot be read" in said(capsys, 1, "generate", "--config", tmp_path / "none.yaml")[1]


def parsed(tmp_path: Path, text: str, *argv: str) -> Namespace:
    (tmp_path / "run.yaml").write_text(text)
    return _parse([*argv, "--config", str(tmp_path / "run.yaml")])


def test_config_values_are_those_of_the_flags(tmp_path: Path) -> None:
    ask = parsed(tmp_path, "store: s\nstop: [a, b]\n", "ask", "What?")  # a list swallows no positional argument
    assert (ask.question, ask.store, ask.stop) == ("What?", "s", ["a", "b"])
    assert parsed(tmp_path, "store: s\nquestion: What?\n", "ask").question == "What?"
    train = parsed(
        tmp_path, "model: m\ndata: 2024\nlearning_rate: 1e-4\nr: 4\nrslora: true\nresume: false\nseed:\n"
        "targets: q_proj\nbatch-size: 7\n", "train", "--batch-size", "3",
    )  # fmt: skip
    assert (train.data, train.learning_rate, train.rank, train.seed) == ("2024", 1e-4, 4, 0)
    assert (train.rslora, train.resume, train.targets, train.batch_size) == (True, False, ["q_proj"], 3)
    spoken = _parse(["ask", "--store", "s", "--stop", "END", "What?", "--stop", "x"])  # one text each
    assert (spoken.question, spoken.stop) == ("What?", ["END", "x"])
    # a value that looks like the flag is a value
    assert _parse(["generate", "--model=m", "--prompt=--config"]).config is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("modle: m\n", "modle: no such flag of this verb: did you mean model?"),
        ("optimizer_q: m\n", "optimizer_q: no such flag of this verb: known are model, quantize, dtype, prompt"),
        ("config: other\n", "config: no such flag"),
        ("model: {a: b}\n", "model: got a mapping, wanted a plain value"),
        ("model: [a]\n", "model: got a list, wanted a plain value"),
        ("stop: [a, {b: c}]\n", "stop: got a mapping, wanted a plain value"),
        ("stop: [no]\n", "stop: got false, wanted a value: put a word"),
        ("top_k: many\n", "top_k: got 'many', wanted int"),
        ("quantize: int4\n", "quantize: got 'int4', wanted nf4, fp4, none"),
        ("raw: 1\n", "raw: got 1, wanted true or false"),
        ("top_k: 1\ntop-k: 2\n", "top-k: says again what top_k says"),
        ("- a\n", "holds a list"),
    ],
)
def test_config_errors_name_file_and_key(text: str, wanted: str, tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    _, err = said(capsys, 1, "generate", "--config", config)
    assert err.startswith(f"qlorag: error: {config}: ") and wanted in err and err.count("\n") == 1


def test_debug_in_the_file_lets_the_error_through(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("debug: true\nmodel: nowhere\nprompt: x\n")
    with pytest.raises(RecipeError, match="nowhere"):
        main(["generate", "--config", str(tmp_path / "run.yaml")])


def test_table_shows_what_it_is_given(capsys: Capture) -> None:
    cells = ("a \\[/b] c", "[bold]x", ":bee: [/]", "/tmp/[/x]")
    Display().table(["/tmp/[/x]", "[b]h", ":bee:", ""], [cells], title="[/t] :bee:")
    out = capsys.readouterr().out
    assert all(text in out for text in (*cells, "[b]h", "[/t] :bee:"))
    Display().say("[/x] :bee:")
    assert capsys.readouterr().out == "[/x] :bee:\n"


def test_a_table_is_as_wide_as_its_names_where_no_terminal_is(
    tiny_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = said(capsys, 0, "inspect", tiny_dir, "--tensors")
    assert "│ model.layers.0.post_attention_layernorm.weight │" in out
    _, err = said(capsys, 0, "inspect", tiny_dir, "--tensors", "--json")
    assert "│ model.layers.0.post_attention_layernorm.weight │" in err


def test_inspect_an_interrupted_run(trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "run[/x]"
    shutil.copytree(trained / "adapter", run)
    for name in ("adapter_config.json", "adapter_model.safetensors", "loss.png"):
        (run / name).unlink()
    value = result(capsys, "inspect", run)
    assert value["kind"] == "run" and value["step"] == ITERS and value["losses"]["train"]["step"] == ITERS
    out, _ = said(capsys, 0, "inspect", run)
    assert f"step {ITERS}" in out and "last train loss" in out and f"--adapter-path {run} and --resume" in out
    shutil.rmtree(run / "checkpoints")
    assert "--overwrite" in said(capsys, 0, "inspect", run)[0]
    model = copy_of(tiny_dir, tmp_path)
    (model / "notes.jsonl").write_text("{}\n")
    assert result(capsys, "inspect", model)["kind"] == "model"


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["generate", "--model", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "--model", "TINY", "--prompt", ""], ""),
        (["generate", "--model", "TINY", "--prompt", "x", "--top-p", "2"], "--top-p=2.0, wanted in (0, 1]"),
        (["generate", "--model", "TINY", "--prompt", "x", "--max-tokens", "0"], "--max-tokens 0"),
        (["chat", "--model", "TINY", "--max-tokens", "0"], "--max-tokens 0"),
        (["ask", "--store", "EMPTY", "What?", "--max-tokens", "-1"], "--max-tokens -1"),
        (["generate", "--model", "TINY", "--prompt", "x", "--raw", "--system", "s"], "--system with --raw"),
        (["generate", "--model", "TINY", "--prompt", "x", "--dtype", "int4"], "--dtype int4: wanted auto"),
        (["generate", "--model", "TINY", "--prompt", "x", "--adapter-path", "nowhere"], "nowhere: no such folder"),
        (["train", "--model", "TINY", "--data", "nowhere"], "train.jsonl"),
        (["train", "--model", "TINY", "--data", "DATA", "--targets", "qproj"], "qproj"),
        (["train", "--model", "TINY", "--data", "DATA", "--rank", "0"], "r=0"),
        (["train", "--model", "TINY", "--data", "DATA", "--num-layers", "0"], "num_layers=0: want at least 1; without"),
        (["generate", "--model", "TINY", "--prompt", "x", "--temp", "-1"], "--temp=-1.0, wanted at least 0"),
        (["generate", "--model", "TINY", "--prompt", "x", "--min-p", "2"], "--min-p=2.0, wanted"),
        (["inspect", "DATA", "--quantize", "nf4"], "is no model, and only a decoder is put in 4 bits: leave it out"),
        (["inspect", "TINY", "--model", "TINY"], "holds no rows whose tokens could be counted"),
        (["inspect", "DATA", "--tensors"], "is no model: leave it out"),
        (["inspect", "--backends", "--quantize", "nf4"], "are about a folder: give one"),
        (["train", "--model", "TINY", "--data", "DATA", "--iters", "0"], "iters=0, wanted at least 1"),
        (["evaluate", "--model", "TINY", "--data", "nowhere"], "nowhere"),
        (["search", "--store", "EMPTY", "What?", "--k", "0"], "--k 0: wanted at least 1"),
        (["index", "DATA", "--store", "FILE"], "a file, wanted a folder for the store"),
        (["generate", "--model", "TINY", "--prompt", "x", "--adapter-path", "STOPPED"], "checkpoints/step-0000002"),
        (["inspect", "EMPTY"], "EMPTY"),
        (["inspect"], "give a folder"),
        (["fuse", "--model", "TINY", "--adapter-path", "EMPTY", "--save-path", "OUT"], "adapter_model.safetensors"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    argv: list[str], wanted: str, trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"TINY": str(tiny_dir), "DATA": str(trained / "data"), "FILE": str(trained / "data" / "train.jsonl"),
             "STOPPED": str(trained / "stopped")}  # fmt: skip
    (trained / "stopped" / "checkpoints" / "step-0000002").mkdir(parents=True, exist_ok=True)
    status = 0 if argv[-1] == "" else 1  # an empty prompt is an empty user turn, which a chat template can hold
    _, err = said(capsys, status, *(names.get(a, a) for a in argv))
    if status:
        assert err.startswith("qlorag: error: ") and err.count("\n") == 1 and wanted in err
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["EMPTY"]


def test_an_encoder_is_not_put_in_4_bits_for_an_inspection(minilm_dir: Path, capsys: Capture) -> None:
    _, err = said(capsys, 1, "inspect", minilm_dir, "--quantize", "nf4")
    assert "is a model of type bert, and only a decoder is put in 4 bits" in err


@pytest.mark.parametrize(
    ("quantize", "wanted"),
    [
        ({"block_size": 64}, "has no kind"),
        ({"kind": "nf4", "surprise": 1}, "has surprise=1, want only kind, block_size, double_quant"),
        ({"kind": "nf4", "block_size": "64"}, "has block_size='64', want int"),
        ({"kind": 4}, "has kind=4, want str"),
        ({"kind": "int8"}, "kind='int8', wanted nf4 or fp4: say --quantize yourself"),
    ],
)
def test_what_an_adapter_records_of_its_base_is_checked(
    quantize: dict[str, Any], wanted: str, trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    adapter = copy_of(trained / "adapter", tmp_path)
    path = adapter / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "qlorag.base_quantize": json.dumps(quantize)})
    _, err = said(capsys, 1, "generate", "--model", tiny_dir, "--adapter-path", adapter, "--prompt", "x")
    assert wanted in err and err.count("\n") == 1


def test_minus_one_layers_are_all(trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    run = ["train", "--model", tiny_dir, "--data", trained / "data", "--iters", 1, "--dtype", "float32"]
    out, _ = said(capsys, 0, *run, "--num-layers", "-1", "--adapter-path", tmp_path / "a")
    assert "21 layers adapted" in out  # 7 in each of 3 blocks


def test_wrong_base_is_refused_with_both_fingerprints(
    trained: Path, tiny_dir: Path, capsys: Capture, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = copy_of(tiny_dir, tmp_path)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    _, err = said(capsys, 1, "generate", "--model", other, "--adapter-path", trained / "adapter", "--prompt", "x")
    fingerprints = {result(capsys, "inspect", m)["fingerprint"][:12] for m in (tiny_dir, other)}
    assert len(fingerprints) == 2 and all(f in err for f in fingerprints)


VERBS = ("pull", "fuse", "export", "inspect", "train", "evaluate", "generate", "chat", "index", "search", "ask", "demo")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_does_not_import_torch(argv: list[str]) -> None:
    """Nor what else takes long to import. So it takes 0.2 s, not the 3 s of torch."""
    heavy = ("torch", "numpy", "tokenizers", "hnswlib", "matplotlib", "yaml")
    code = (
        "import sys\nfrom qlorag.recipes.cli.main import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"found = [name for name in {heavy!r} if name in sys.modules]\nassert not found, found\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("qlorag 0." if argv == ["--version"] else "usage: qlorag")


def test_the_help_names_every_verb_and_each_takes_the_common_flags(capsys: Capture) -> None:
    from qlorag.recipes.cli import build_parser

    _, verbs = build_parser()
    assert sorted(verbs) == sorted(VERBS)
    for name, verb in verbs.items():
        assert not verb.allow_abbrev
        assert {"--config", "--json", "--debug"} <= {f for a in verb._actions for f in a.option_strings}, name
        assert all(a.help for a in verb._actions if a.option_strings), name


def test_the_entry_point_imports_nothing_before_it_can_be_interrupted() -> None:
    code = "import sys; had = set(sys.modules); import qlorag.recipes.cli.main; print(*set(sys.modules) - had)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name.startswith("qlorag") for name in run.stdout.split()), run.stdout


def test_a_run_whose_reader_goes_is_finished(tiny_dir: Path, trained: Path, tmp_path: Path) -> None:
    """`qlorag train ... | head -1` trains to the end and saves: only the output is dropped."""
    run = ["train", "--model", tiny_dir, "--data", trained / "data", "--iters", 3, "--adapter-path", tmp_path / "a",
           "--steps-per-report", 1, "--dtype", "float32"]  # fmt: skip
    command = [sys.executable, "-m", "qlorag.recipes.cli", *map(str, run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_a_wrong_command_is_an_error_without_torch() -> None:
    code = (
        "import sys\nfrom qlorag.recipes.cli.main import main\nassert main(['inspect', '--config', 'no.yaml']) == 1\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that no part of the program raises on purpose is a bug: it is not shown as a user's error."""
    import qlorag.recipes.hub.pull as module

    def broken(name: str) -> Path:
        raise ValueError("invalid literal")

    monkeypatch.setattr(module, "pull", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["pull", "minilm-l6"])


def test_defaults_of_the_lora_flags_are_those_of_the_layer() -> None:
    from qlorag.lora import LoRAConfig
    from qlorag.recipes.cli.verbs.train import LORA_DEFAULTS

    assert {name: getattr(LoRAConfig(), name) for name in LORA_DEFAULTS} == LORA_DEFAULTS


def test_an_unknown_verb_or_flag_exits_with_2(capsys: Capture) -> None:
    for argv in (["fly"], ["generate"], ["train", "--no-such"], ["inspect", "--conf", "f"], ["inspect", "--config"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 2


@pytest.mark.model
def test_index_search_ask(minilm_dir: Path, smollm2_dir: Path, capsys: Capture, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "bees.txt").write_text("A hive has one queen. Worker bees gather nectar and make honey from it.")
    (documents / "tides.md").write_text("# Tides\n\nThe moon pulls the sea, so the water rises and falls twice a day.")
    (documents / "broken.txt").write_bytes(b"\xff\xfe\x00bad\x80")
    store = tmp_path / "store"
    flags = ("--store", store, "--encoder", minilm_dir)
    out, _ = said(capsys, 1, "index", documents, *flags)  # 1: one file was left out, and the others are in
    assert "left out" in out and "broken.txt" in out and "2 documents added" in out
    assert "already holds a store" in said(capsys, 1, "index", documents, *flags)[1]
    (documents / "broken.txt").unlink()
    assert result(capsys, "index", documents, *flags, "--append")["unchanged"] == 2
    hits = result(capsys, "search", "why does the water level change at the beach?", *flags)["hits"]
    assert hits[0]["uri"].endswith("tides.md")
    text = (documents / "tides.md").read_text()
    assert text[hits[0]["start"] : hits[0]["end"]] == hits[0]["text"]
    ask = ("ask", *flags, "--model", smollm2_dir, "--max-tokens", 60)
    answer = result(capsys, *ask, "What do worker bees make?", "--k", 1)
    assert "honey" in answer["answer"] and answer["citations"] == [1]
    assert answer["sources"][0]["uri"].endswith("bees.txt")
    many, note = said(capsys, 0, *ask, "What do worker bees make?", "--k", 2, "--score-threshold", -1,
                      "--system", "Be brief.")  # fmt: skip
    assert "[2]" in many and "passages fit" not in note
    nothing = result(capsys, *ask, "zxqv 7719 blorp", "--score-threshold", 0.6)
    assert nothing["answer"] == "I could not find this in the documents." and nothing["sources"] == []
    assert result(capsys, "inspect", store)["kind"] == "store"
