"""Tokenizers as people have them: what is used is what tokenizer.json says, or a line says otherwise."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from built import tokens_of
from command import Call, one_line
from tokenizers import Tokenizer
from toy import make_text, make_tokenizer
from transformers import AutoTokenizer

from revpatch.corpus.build import build_shards
from revpatch.corpus.tokenizer import check_made_for, load_tokenizer, prompt_ids, read_tokenizer, tokenizer_fingerprint
from revpatch.shards.format import Manifest

Edit = Callable[[dict[str, Any]], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BOS, EOS, PAD = "<s>", "<|endoftext|>", "<pad>"


def folder_of(folder: Path, edit: Edit = lambda _: None, **config: Any) -> Path:
    """A folder with the toy's tokenizer.json, edited, and a tokenizer_config.json."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    edit(state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, **config}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def added(id_: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, "special": True, **flags}


def template(*tokens: str, ids: dict[str, int]) -> dict[str, Any]:
    """A post-processor; `$` is the text."""
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if token == "$" else {"SpecialToken": {"id": token, "type_id": 0}}
        for token in tokens
    ]
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ids}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that are logged by `revpatch.corpus`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("revpatch.corpus")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def source_of(folder: Path, *texts: str) -> Path:
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return source


def build(revpatch: Call, folder: Path, out: Path, *texts: str, options: tuple[object, ...] = ()) -> Any:
    source = source_of(out.parent, *(texts or [make_text(i) for i in range(9)]))
    command = ("shards", "build", source, "--tokenizer", folder, "--out", out, "--block-size", 4, "--workers", 1)
    return revpatch(*command, *options)


# --- damaged, missing, foreign -------------------------------------------------------------------------------------


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def cut(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])


def without_file(**config: str | dict[str, Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    return spoil


DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "cut off": (cut, ("tokenizer.json", "cut off", "copy it again")),
    "empty": (write("tokenizer.json", ""), ("tokenizer.json", "empty", "copy it again")),
    "a git-LFS pointer": (write("tokenizer.json", POINTER), ("tokenizer.json", "git lfs pull")),
    "missing": (without_file(), ("no tokenizer in it", "tokenizer.json")),
    "a slow one": (without_file(tokenizer_class="CanineTokenizer"), ("not a fast tokenizer", "tokenizer.json")),
    "no EOS": (write("tokenizer_config.json", "{}"), ("no end-of-text token",)),
    "an EOS that is not in it": (
        lambda folder: folder_of(folder, eos_token="<eos>"),
        ("tokenizer_config.json: eos_token", "'<eos>'", "tokenizer.json", "name the one that ends a text"),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tokenizer_that_cant_be_used_is_named_in_one_line(case: str, revpatch: Call, tmp_path: Path) -> None:
    spoil, words = DAMAGED[case]
    folder = folder_of(tmp_path / "base")
    spoil(folder)
    one_line(build(revpatch, folder, tmp_path / "out"), "base", *words)
    assert not (tmp_path / "out").exists()
    one_line(build(revpatch, tmp_path / "gone", tmp_path / "out"), "gone", "no such local folder")
    one_line(build(revpatch, folder / "tokenizer_config.json", tmp_path / "out"), "is a file", "folder")


# --- what the file says --------------------------------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}


def digits_apart(state: dict[str, Any]) -> None:
    """As SmolLM2's, and with a token of two digits that is never to be used."""
    state["pre_tokenizer"] = DIGITS
    state["model"]["vocab"]["19"] = 300
    state["model"]["merges"].append(["1", "9"])


CODE = {"AutoTokenizer": ["code.Mine", None]}
TEXTS = ["In 1984, 2024 and 30,500 of THEM", "it's DON'T\n\n  x = 10", "the patch learns 77"]
FILES: dict[str, tuple[Edit, dict[str, Any], tuple[str, ...]]] = {
    # what the file holds, its config, and what is said
    "plain": (lambda _: None, {}, ()),
    "SmolLM2's, digits apart": (
        digits_apart,
        {"tokenizer_class": "GPT2Tokenizer"},
        ("GPT2Tokenizer", "other ids", "1984"),
    ),
    "BOS in the config alone": (
        lambda _: None,
        {"add_bos_token": True, "bos_token": EOS},
        ("no BOS before a text", "add_bos_token"),
    ),
    "an EOS that the config adds": (
        lambda _: None,
        {"eos_token": "<eos>", "added_tokens_decoder": {"300": {"content": "<eos>", "special": True}}},
        (),
    ),
    "dropout": (lambda state: state["model"].update(dropout=0.5), {}, ("dropout is off",)),
    "code of its own": (lambda _: None, {"tokenizer_class": "Mine", "auto_map": CODE}, ("auto_map", "never run")),
}


@pytest.mark.parametrize("case", FILES)
def test_the_ids_are_those_of_the_file(case: str, revpatch: Call, said: list[str], tmp_path: Path) -> None:
    edit, config, words = FILES[case]
    folder = folder_of(tmp_path / "base", edit, **config)
    (folder / "code.py").write_text("open('ran', 'w')\n")
    for out in ("one", "two"):
        result = build(revpatch, folder, tmp_path / out, *TEXTS)
        assert result.code == 0, result
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_truncation()
    own.no_padding()
    own.model.dropout = None
    end = 300 if "added_tokens_decoder" in config else 0
    expected = [id_ for text in TEXTS for id_ in (*own.encode(text, add_special_tokens=False).ids, end)]
    found = tokens_of(tmp_path / "one")
    assert found == tokens_of(tmp_path / "two") == expected[: len(found)]
    lines = [line for line in said if str(folder) in line]
    assert len(lines) <= 2
    assert [word for word in words if word not in " ".join(lines)] == []
    assert bool(lines) == bool(words), lines
    loaded = load_tokenizer(str(folder))
    assert prompt_ids(loaded, TEXTS[0]) == own.encode(TEXTS[0], add_special_tokens=False).ids
    assert Manifest.read(tmp_path / "one").tokenizer.fingerprint == tokenizer_fingerprint(loaded)
    if not words:  # what was built before this was checked is still good
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    loaded.save_pretrained(tmp_path / "saved")
    again, notices = read_tokenizer(str(tmp_path / "saved"))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(loaded)
    assert not [line for line in notices if "other ids" in line]
    assert not Path("ran").exists()


# --- framing -------------------------------------------------------------------------------------------------------

IDS = {BOS: 300, EOS: 0, PAD: 301}


def with_template(*tokens: str) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        state["added_tokens"] += [added(300, BOS), added(301, PAD)]
        state["post_processor"] = template(*tokens, ids={t: IDS[t] for t in tokens if t != "$"})

    return edit


FRAMES: dict[str, tuple[Edit, dict[str, Any], list[int], list[int]]] = {
    # what comes before a document, and what before a prompt
    "no template": (with_template("$"), {}, [], []),
    "BOS": (with_template(BOS, "$"), {"bos_token": BOS}, [300], [300]),
    "EOS alone": (with_template("$", EOS), {}, [], []),
    "BOS is EOS": (with_template(EOS, "$"), {"bos_token": EOS}, [], [0]),
    "its config asks for it in vain": (with_template("$"), {"bos_token": BOS, "add_bos_token": True}, [], []),
}


@pytest.mark.parametrize("case", FRAMES)
def test_documents_and_prompts_are_framed_alike(case: str, revpatch: Call, tmp_path: Path) -> None:
    edit, config, document, prompt = FRAMES[case]
    folder = folder_of(tmp_path / "base", edit, **config)
    plain = make_tokenizer().backend_tokenizer
    texts = ["the patch", "", "learns it", "what a stream brings"]
    assert build(revpatch, folder, tmp_path / "out", *texts).code == 0
    expected = [id_ for text in texts if text for id_ in (*document, *plain.encode(text).ids, 0)]
    found = tokens_of(tmp_path / "out")
    assert found == expected[: len(found)]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokenizer"].get("bos_token_ids", []) == document
    loaded = load_tokenizer(str(folder))
    assert prompt_ids(loaded, "the patch") == [*prompt, *plain.encode("the patch").ids]
    if document:
        spelled = loaded.decode(document)
        assert prompt_ids(loaded, f"{spelled}the patch") == prompt_ids(loaded, "the patch"), "never twice"


def test_a_long_document_begins_once(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder_of(tmp_path / "base", with_template(BOS, "$"), bos_token=BOS)))
    source = source_of(tmp_path, make_text(1), " ".join(make_text(i) for i in range(90)), make_text(2))
    build_shards(source, tokenizer, 4, tmp_path / "whole")
    request.getfixturevalue("short_pieces")
    build_shards(source, tokenizer, 4, tmp_path / "pieces")
    assert tokens_of(tmp_path / "pieces") == tokens_of(tmp_path / "whole")
    assert tokens_of(tmp_path / "pieces").count(300) == 3


# --- characters ----------------------------------------------------------------------------------------------------

CYRILLIC = "Мама мыла раму, а папа спал. " * 4
LATIN = "the cat sat on the mat, and it was low. " * 4
LETTERS = "abcdefghijklmnopqrstuvwxyz,. "


def model(kind: str, vocabulary: Any, pre_tokenizer: Any = None, **options: Any) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        state["model"] = {"type": kind, "vocab": vocabulary, **options}
        state["pre_tokenizer"] = pre_tokenizer
        state["decoder"] = None

    return edit


def numbered(*tokens: str) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate([EOS, "<unk>", *tokens])}


CHARACTERS = numbered(*LETTERS)
FALLBACK = numbered(*LETTERS, *(f"<0x{value:02X}>" for value in range(256)))
PIECES = [[EOS, 0.0], ["<unk>", -9.0], *([token, -2.0] for token in LETTERS)]
SPLIT = {"type": "Whitespace"}
REMOVED = {"type": "Split", "pattern": {"Regex": "[А-я]"}, "behavior": "Removed", "invert": False}
LETTER_COUNT = sum(character.isalpha() for character in CYRILLIC)
LOSSY: dict[str, tuple[Edit, int]] = {
    # characters that are lost of CYRILLIC
    "byte-level": (lambda _: None, 0),
    "falls back to bytes": (model("BPE", FALLBACK, merges=[], byte_fallback=True, unk_token="<unk>"), 0),
    "vanish": (model("BPE", CHARACTERS, merges=[]), LETTER_COUNT),
    "WordLevel": (model("WordLevel", numbered("the", "cat", ",", "."), SPLIT, unk_token="<unk>"), LETTER_COUNT),
    "removed": (
        lambda state: state.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [REMOVED, BYTES]}),
        LETTER_COUNT,
    ),
}


@pytest.mark.parametrize("case", LOSSY)
def test_characters_that_cant_be_spelled_are_counted(
    case: str, revpatch: Call, said: list[str], tmp_path: Path
) -> None:
    edit, lost = LOSSY[case]
    folder = folder_of(tmp_path / "base", edit)
    result = build(revpatch, folder, tmp_path / "out", CYRILLIC, LATIN)
    if not lost:
        assert result.code == 0
        assert "characters" not in (tmp_path / "out/manifest.json").read_text()
        return
    one_line(result, "out", "can't spell", "1.00%", "--max-lost")
    assert not (tmp_path / "out").exists()
    result = build(revpatch, folder, tmp_path / "out", CYRILLIC, LATIN, options=("--max-lost", 1))
    assert result.code == 0, result
    manifest = Manifest.read(tmp_path / "out")
    if case != "WordLevel":  # it knows few words of LATIN either
        assert manifest.lost_characters == lost
    assert manifest.characters == len(CYRILLIC) + len(LATIN)
    assert [line for line in said if "can't spell" in line]
    shown = revpatch("shards", "show", tmp_path / "out", "--blocks", 0)
    assert f"lost         {manifest.lost_characters:,} of" in shown.out


def test_pages_of_html_are_counted(revpatch: Call, said: list[str], tmp_path: Path) -> None:
    pages = ("\ufeff\n <!doctype HTML PUBLIC>a b", "<HTML> and so on\n" * 200, "write <html> at the beginning", "a b")
    assert build(revpatch, folder_of(tmp_path / "base"), tmp_path / "out", *pages).code == 0
    (line,) = [line for line in said if "pages of HTML" in line]
    assert f"{tmp_path}/out: 2 documents" in line and "pandoc" in line


def test_special_tokens_that_the_text_spells_are_counted(revpatch: Call, said: list[str], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", with_template(BOS, "$"), bos_token=BOS)
    assert build(revpatch, folder, tmp_path / "out", f"one{EOS}two", "three", f"{PAD} four").code == 0
    assert Manifest.read(tmp_path / "out").special_tokens == 2
    assert [line for line in said if "special tokens 2 times" in line]


def test_sets_are_refused_of_another_tokenizer_or_without_embeddings_and_named_of_another_frame(tmp_path: Path) -> None:
    """An id that only an added token has, as Llama 2's pad token, is refused where a block holds it."""
    tokenizer = load_tokenizer(str(folder_of(tmp_path / "base", with_template(BOS, "$"), bos_token=BOS)))
    fingerprint = tokenizer_fingerprint(tokenizer)
    plain = build_shards(source_of(tmp_path, "all of it " * 9), tokenizer, 4, tmp_path / "plain")
    held = build_shards(source_of(tmp_path, f"a {PAD} b " * 9), tokenizer, 4, tmp_path / "held")
    assert check_made_for("here", plain, tokenizer, fingerprint, "base", 301) is None
    with pytest.raises(ValueError, match=r"here: token ids up to 301 \('<pad>'\), .* only 301 embeddings"):
        check_made_for("here", held, tokenizer, fingerprint, "base", 301)
    with pytest.raises(ValueError, match=r"here: built with tokenizer .* of fingerprint"):
        check_made_for("here", plain, tokenizer, "0" * 64, "base", 302)
    older = replace(plain, tokenizer=replace(plain.tokenizer, bos_token_ids=()))
    notice = check_made_for("here", older, tokenizer, fingerprint, "base", 302)
    assert notice is not None and "begin with no special token" in notice and "'<s>'" in notice
    with pytest.raises(ValueError, match=r"prompt holds the token '<pad>' .* 301 embeddings"):
        prompt_ids(tokenizer, f"a {PAD} b", 301)
