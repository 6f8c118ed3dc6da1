"""Text out of a real run's patches, from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Call, in_a_process, one_line
from toy import POSITIONS, Toy
from trained_run import PROMPT, Run
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def text(run: Run, revpatch: Call) -> Callable[..., str]:
    """text(*options): what is written after the prompt by the last commit, and nothing else is."""

    def write(*options: str) -> str:
        result = revpatch(
            "generate",
            "--patch",
            run.entry("001_second_commit.safetensors"),
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "16",
            *options,
        )
        assert (result.code, result.err) == (0, ""), result
        return result.out

    return write


def base_writes(toy: Toy, **options: Any) -> str:
    """The base's own text, without a patch."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy.base), AutoTokenizer.from_pretrained(toy.base)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.manual_seed(options.pop("seed", 0))
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, pad_token_id=0, **options)
    decoded: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return decoded + "\n"


def test_gate_off_is_the_bases_own_text(toy: Toy, text: Callable[..., str]) -> None:
    plain = ["--gate", "off", "--repetition-penalty", "1", "--no-repeat-ngram", "0"]
    assert text(*plain, "--greedy") == base_writes(toy, do_sample=False)
    drawn = base_writes(toy, do_sample=True, temperature=0.7, top_p=0.8, top_k=0, seed=5)
    assert text(*plain, "--temperature", "0.7", "--top-p", "0.8", "--seed", "5") == drawn
    controlled = base_writes(toy, do_sample=False, repetition_penalty=1.15, no_repeat_ngram_size=4)
    assert text("--gate", "off", "--greedy") == controlled


def test_the_seed_decides_what_is_drawn(text: Callable[..., str]) -> None:
    drawn = [text("--seed", seed, "--temperature", "2") for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text("--top-k", "1", "--temperature", "3") == text("--greedy"), "the one most probable is the greedy one"


def test_a_process_of_its_own_prints_the_text_alone_and_to_the_letter(run: Run, tmp_path: Path) -> None:
    """Of a patch file by itself, by the other name of the option."""
    alone, prompt = tmp_path / "patch.safetensors", ":bug: [bold]x[/bold]\ta\\b"
    alone.write_bytes(run.entry("001_second_commit.safetensors").read_bytes())
    done = in_a_process("generate", "--patch-ckpt", str(alone), "--prompt", prompt, "--max-new-tokens", "2")
    assert (done.code, done.err) == (0, "") and done.out.startswith(prompt), done


def test_no_more_is_written_than_the_model_has_room_for(run: Run, toy: Toy, revpatch: Call) -> None:
    prompt = " ".join(["the"] * (POSITIONS - 2))
    tokens = len(toy.tokenizer(prompt).input_ids)
    assert tokens == POSITIONS - 2
    command = ["generate", "--patch", run.entry("001_second_commit.safetensors"), "--prompt", prompt, "--greedy"]
    result = revpatch(*command)
    assert (result.code, result.err) == (0, ""), result
    assert len(result.out) > len(prompt)
    one_line(revpatch(*command, "--max-new-tokens", "50"), POSITIONS, "at most 2", "--max-new-tokens")


def test_a_run_or_an_entry_of_it_may_be_named(run: Run, text: Callable[..., str], revpatch: Call) -> None:
    written = {}
    for reference in ("", "@001_second_commit", "@commit", "@commit~1", "@000_first_commit", "@start~1"):
        result = revpatch(
            *("generate", "--patch", f"{run.directory}{reference}", "--prompt", PROMPT, "--max-new-tokens", "16"),
            "--greedy",
        )
        assert (result.code, result.err) == (0, ""), result
        written[reference] = result.out
    assert written[""] == written["@001_second_commit"] == written["@commit"] == text("--greedy")
    assert written["@commit~1"] == written["@000_first_commit"] != written[""]
    assert written["@start~1"] == text("--greedy", "--gate", "off"), "a patch begins as the identity"


def test_several_prompts_and_samples(run: Run, text: Callable[..., str], revpatch: Call, tmp_path: Path) -> None:
    """Each prompt's texts are what they are alone; a sample is told from another."""
    file = tmp_path / "prompts.txt"
    file.write_text("rusty gates\n\nkettle\n", encoding="utf-8")
    command = [
        "generate",
        "--patch",
        run.directory,
        "--prompt",
        PROMPT,
        "--prompt-file",
        file,
        "--max-new-tokens",
        "16",
    ]
    result = revpatch(*command)
    assert (result.code, result.err) == (0, "")
    first, rest = result.out.removeprefix("[prompt 1 of 3, sample 1 of 1]\n").split("[prompt 2 of 3, sample 1 of 1]\n")
    second, third = rest.split("[prompt 3 of 3, sample 1 of 1]\n")
    assert first == text()
    assert second.startswith("rusty gates")
    assert third.startswith("kettle")
    result = revpatch(*command, "--json", "--num-samples", "2", "--temperature", "2")
    told = json.loads(result.out)
    assert [(t["prompt"], t["sample"]) for t in told["texts"]] == [
        (prompt, sample) for prompt in (PROMPT, "rusty gates", "kettle") for sample in (1, 2)
    ]
    assert told["texts"][0]["text"] != told["texts"][1]["text"]
    assert all(t["text"].startswith(t["prompt"]) and t["gate"] == "learned" for t in told["texts"])
    shown = revpatch(*command, "--num-samples", "2", "--temperature", "2").out
    heads = [f"[prompt {prompt} of 3, sample {sample} of 2]" for prompt in (1, 2, 3) for sample in (1, 2)]
    assert shown == "".join(f"{head}\n{t['text']}\n" for head, t in zip(heads, told["texts"], strict=True))


def test_off_and_learned_side_by_side(text: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = text("--compare", "--greedy")
    assert re.search(r"off\s+. learned", shown)
    columns = [[cell.strip() for cell in line.split("\u2502")[1:3]] for line in shown.splitlines() if "\u2502" in line]
    assert {len(row) for row in columns} == {2}
    off, learned = ("".join("".join(column).split()) for column in zip(*columns, strict=True))
    assert off == "".join(text("--greedy", "--gate", "off").split())
    assert learned == "".join(text("--greedy").split())
    told = json.loads(text("--compare", "--greedy", "--json"))
    assert [t["gate"] for t in told["texts"]] == ["off", "learned"]
    assert [t["text"] + "\n" for t in told["texts"]] == [
        text("--greedy", "--gate", gate) for gate in ("off", "learned")
    ]


def test_a_text_is_shown_while_it_is_written(run: Run, monkeypatch: pytest.MonkeyPatch, revpatch: Call) -> None:
    """Some of it is on the terminal before the last token is drawn."""
    from transformers import TextStreamer

    seen: list[tuple[str, bool]] = []
    show = TextStreamer.on_finalized_text

    def showing(self: TextStreamer, text: str, stream_end: bool = False) -> None:
        seen.append((text, stream_end))
        show(self, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", showing)
    command = ["generate", "--patch", run.directory, "--prompt", PROMPT, "--max-new-tokens", "24"]
    result = revpatch(*command)
    assert len([text for text, _ in seen if text]) > 1
    assert "".join(text for text, _ in seen) + "\n" == result.out
    seen.clear()
    revpatch(*command, "--num-samples", "2")
    assert [end for _, end in seen].count(True) == 2, "several are shown as they are written too"
    seen.clear()
    assert json.loads(revpatch(*command, "--json").out)["texts"][0]["text"] + "\n" == result.out
    assert not seen
