"""Generation: filters by hand and against transformers, stops, streaming, and what it reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from qlorag.models import ModelError, TemplateError, generate, load_model, load_tokenizer
from qlorag.models.decoder.generate import GenerationStats, _StopBuffer
from qlorag.models.decoder.sampling import Sampler, Sampling, keep_min_p, keep_top_k, keep_top_p, penalize

pytestmark = pytest.mark.isa

INF = float("inf")
LOGITS = torch.log(torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))


def kept(logits: torch.Tensor) -> list[int]:
    return [i for i, x in enumerate(logits.tolist()) if x > -INF]


def test_filters_by_hand() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [0, 1]
    assert kept(keep_top_p(LOGITS, 0.5)) == [0]  # the first alone reaches it
    assert kept(keep_top_p(LOGITS, 0.69)) == [0, 1]
    assert kept(keep_top_p(LOGITS, 0.71)) == [0, 1, 2]
    assert kept(keep_top_p(LOGITS, 0.01)) == [0]  # never nothing
    assert kept(keep_min_p(LOGITS, 0.25)) == [0, 1, 2]  # at least 0.125
    assert kept(keep_min_p(LOGITS, 1.0)) == [0]
    assert penalize(torch.tensor([2.0, -2.0, 1.0]), [0, 1, 1], penalty=2.0).tolist() == [1.0, -4.0, 1.0]


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_distribution_equals_transformers(seed: int) -> None:
    t = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    logits, seen = torch.randn(300) * 3, torch.randint(0, 300, (40,)).tolist()
    s = Sampling(temperature=0.7, top_k=50, top_p=0.8, min_p=0.03, repetition_penalty=1.3)
    ours = Sampler(s).distribution(penalize(logits, seen, penalty=s.repetition_penalty))
    theirs = logits[None]
    for processor in (
        t.RepetitionPenaltyLogitsProcessor(1.3),
        t.TemperatureLogitsWarper(0.7),
        t.TopKLogitsWarper(50),
        t.TopPLogitsWarper(0.8),
        t.MinPLogitsWarper(0.03),
    ):
        theirs = processor(torch.tensor([seen]), theirs)
    torch.testing.assert_close(ours, theirs.softmax(-1)[0])


def test_draws_follow_the_distribution_and_the_seed() -> None:
    draws = [Sampler(Sampling(temperature=1.0, seed=7)) for _ in range(2)]
    first, second = ([d(LOGITS, []) for _ in range(4000)] for d in draws)
    assert first == second
    # 4000 draws at p = 0.5: five standard deviations are 0.04
    assert abs(first.count(0) / 4000 - 0.5) < 0.04
    assert Sampler(Sampling())(LOGITS, []) == 0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*wanted"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_stop_strings_are_held_back_until_they_are_sure() -> None:
    held = _StopBuffer(["###", "\nUser:"])
    assert held.push("a#") == ("a", False)
    assert held.push("#b\nUs") == ("##b", False)
    assert held.push("e") == ("", False)
    assert held.push("d\n") == ("\nUsed", False)
    assert held.push("x#####") == ("\nx", True)
    whole = _StopBuffer(["stop"])
    assert whole.push("sto") == ("", False) and whole.flush() == "sto"


@pytest.fixture
def tiny(tiny_dir: Path):  # type: ignore[no-untyped-def]
    return load_model(tiny_dir, dtype=torch.float32), load_tokenizer(tiny_dir)


def test_a_run_reports_what_it_did(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    run = generate(model, tok, "hello", max_tokens=20)
    pieces = list(run)
    assert "".join(pieces) == run.text == tok.decode(run.ids)
    assert run.stats.prompt_tokens == len(tok.chat([{"role": "user", "content": "hello"}]))
    assert run.stats.finish_reason in ("length", "eos")
    assert run.stats.generated_tokens == len(run.ids) + (run.stats.finish_reason == "eos")
    lines = run.stats.lines().split("\n")
    assert lines[0].startswith(f"Prompt: {run.stats.prompt_tokens} tokens, ") and lines[2].startswith("Peak memory: ")


def test_rates_by_hand() -> None:
    """Five tokens are one from the prompt's pass and four after it."""
    stats = GenerationStats(prompt_tokens=6, prompt_seconds=3.0, generated_tokens=5, generated_seconds=2.0)
    assert stats.prompt_tps == 2.0 and stats.generation_tps == 2.0
    assert GenerationStats(prompt_tokens=6, prompt_seconds=3.0, generated_tokens=1).generation_tps == 0.0


def test_without_a_template_only_raw_text_runs(tiny, tiny_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, _ = tiny
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(folder)
    with pytest.raises(TemplateError, match=r"no chat template .* raw=True \(--raw\)"):
        generate(model, tok, "hello")
    with pytest.raises(TemplateError, match="no chat template"):
        generate(model, tok, [{"role": "user", "content": "hello"}])
    assert generate(model, tok, "hello", raw=True).prompt_ids == tok.encode("hello")


def test_a_system_message_needs_a_turn_to_stand_before(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    with_system = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert generate(model, tok, "q", system="s").prompt_ids == tok.chat(with_system)
    for prompt, raw in (("q", True), ([5, 6], False), (with_system, False)):
        with pytest.raises(ModelError, match=r"^system: "):
            generate(model, tok, prompt, system="s", raw=raw)


def test_greedy_equals_the_uncached_model(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    run = generate(model, tok, "abc", max_tokens=12)
    list(run)
    ids = list(run.prompt_ids)
    for token in run.ids:
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


def test_stops_at_every_eos_and_at_a_stop_string(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    free = generate(model, tok, "q", max_tokens=30, temperature=1.5, seed=1)
    text = "".join(free)
    stop = text[4:6]
    cut = generate(model, tok, "q", max_tokens=30, temperature=1.5, seed=1, stop=[stop])
    assert "".join(cut) == text[: text.index(stop)] and cut.stats.finish_reason == "stop"
    tok.eos_ids = frozenset({free.ids[3], 2})
    ended = generate(model, tok, "q", max_tokens=30, temperature=1.5, seed=1)
    assert "".join(ended) == tok.decode(free.ids[: free.ids.index(free.ids[3])])
    assert ended.stats.finish_reason == "eos"


def test_streaming_never_splits_a_character(tiny) -> None:  # type: ignore[no-untyped-def]
    _, tok = tiny
    text = "naïve 你好 🙂🙂 👩‍👩‍👧 end"
    stream = tok.stream()
    pieces = [stream.push(i) for i in tok.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert not any("�" in p for p in pieces)
    assert len([p for p in pieces if p]) > 10  # it did stream


def test_prompts_that_cannot_run(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    with pytest.raises(ModelError, match="empty"):
        generate(model, tok, [])
    with pytest.raises(ModelError, match=r"token id 9999 is outside the model's \d+"):
        generate(model, tok, [1, 9999])
    with pytest.raises(ModelError, match="600 tokens, the model was trained for 512"):
        generate(model, tok, [5] * 600)
    run = generate(model, tok, [5] * 510, max_tokens=50)
    list(run)
    assert len(run.ids) <= 2  # no further than the positions it knows


@pytest.mark.model
@pytest.mark.oracle
def test_smollm2_greedy_equals_transformers(smollm2_dir: Path) -> None:
    """In float32: bf16 logits of the two differ in their last bits, and ties then fall differently."""
    t = pytest.importorskip("transformers")
    tok, model = load_tokenizer(smollm2_dir), load_model(smollm2_dir, dtype=torch.float32)
    run = generate(model, tok, "Who is Patroclos Lemoniatis?", max_tokens=24)
    text = "".join(run)
    theirs = t.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    their_tok = t.AutoTokenizer.from_pretrained(smollm2_dir)
    prompt = their_tok.apply_chat_template(
        [{"role": "user", "content": "Who is Patroclos Lemoniatis?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert prompt["input_ids"][0].tolist() == run.prompt_ids
    out = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert their_tok.decode(out[0][len(run.prompt_ids) :], skip_special_tokens=True) == text
    assert "artist" in text  # the invention that the demo mends


def test_a_stop_may_be_one_string(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    whole = "".join(generate(model, tok, [5, 6], max_tokens=30))
    stop = whole[4:7]
    once = "".join(generate(model, tok, [5, 6], max_tokens=30, stop=stop))
    assert once == whole[: whole.index(stop)] == "".join(generate(model, tok, [5, 6], max_tokens=30, stop=[stop]))
    with pytest.raises(ModelError, match=r"stop: \(5,\): wanted a string or several"):
        generate(model, tok, [5, 6], stop=[5])  # type: ignore[list-item]


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(tiny, value: float, temperature: float) -> None:  # type: ignore[no-untyped-def]
    sampler = Sampler(Sampling(temperature=temperature))
    damaged = LOGITS.clone()
    damaged[2] = value
    if value == -INF:
        damaged[:] = value  # alone among others it is a token that is never taken
    with pytest.raises(ModelError, match="logits are NaN or infinite"):
        sampler(damaged, [])


def test_special_tokens_in_a_raw_prompt(tiny) -> None:  # type: ignore[no-untyped-def]
    model, tok = tiny
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    plain = generate(model, tok, prompt, raw=True, max_tokens=1).prompt_ids
    special = generate(model, tok, prompt, raw=True, raw_special=True, max_tokens=1).prompt_ids
    assert special == tok.encode(prompt, parse_special=True) and len(plain) > len(special)
    with pytest.raises(ModelError, match="raw_special"):
        generate(model, tok, prompt, raw_special=True)


def test_an_answer_in_a_chat_ends_where_the_template_ends_a_turn(tiny, tiny_dir: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In the style of Qwen's base models the files stop at "<|endoftext|>" alone, and turns end with "<|im_end|>"."""
    model, _ = tiny
    shutil.copytree(tiny_dir, tmp_path / "base")
    for name in ("generation_config.json", "config.json"):
        config = json.loads((tmp_path / "base" / name).read_text())
        (tmp_path / "base" / name).write_text(json.dumps({**config, "eos_token_id": 0}))
    tok = load_tokenizer(tmp_path / "base")
    assert (tok.eos_ids, tok.turn_ends) == ({0}, {2})

    class ThenEnds(torch.nn.Module):
        """A head that says 5, 6, and then the end of the turn for ever."""

        def __init__(self) -> None:
            super().__init__()
            self.said = iter([5, 6])

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor(next(self.said, 2)), model.config.vocab_size).float()

    head = model.lm_head
    try:
        for prompt, options, ids, reason in (
            ("hi", {}, [5, 6], "eos"),
            ([{"role": "user", "content": "hi"}], {}, [5, 6], "eos"),
            ("hi", {"raw": True}, [5, 6, 2, 2], "length"),  # no chat: the files' end tokens alone
            ([5, 6], {}, [5, 6, 2, 2], "length"),
        ):
            model.lm_head = ThenEnds()
            run = generate(model, tok, prompt, max_tokens=4, **options)
            list(run)
            assert (run.ids, run.stats.finish_reason) == (ids, reason)
    finally:
        model.lm_head = head
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path / "base").turn_ends == frozenset()  # no template
