"""The tokenizer of a base: loaded as its tokenizer.json says, without truncation, padding or chance, and described.

    ids of a document     bos_token_ids + ids of the text + EOS     (an empty text has no ids at all)
    ids of a prompt       bos_token_ids + ids of the text

`bos_token_ids` is what the tokenizer's own template puts before a text: nothing for GPT-2 and Qwen, BOS for Llama and
Gemma. What a template puts after a text is never added to a prompt, as it would end it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel

from revpatch.corpus.encode import Spelling
from revpatch.durable import canonical_json, is_lfs_pointer
from revpatch.shards.format import Manifest, TokenizerInfo

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_FILES = (_FILE, _CONFIG, _MAP, "added_tokens.json")
_WITHOUT_FILE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
"""What transformers makes a tokenizer of where there is no tokenizer.json."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")

SAMPLE = (
    "The patch learns what a stream brings, and forgets little of it.",
    "In 1984, 12 of 30,500 people paid $1,234.56 (about 7.5%) on 2024-02-29 at 09:05.",
    "  two spaces,   three, a tab\there, trailing ones  ",
    "one line\nanother\r\n\n\nand a third after two empty ones\n",
    "I'm sure they'll say we've done what she'd do; it's DON'T and Can't.",
    'def f(x: int) -> str:\n    return f"{x!r:>8}"  # [i for i in range(10)]\n\tif a != b && c == 0x1F: pass;',
    '<div class="a-b_c">https://example.org/a?b=c&d=%20#e</div> me@example.org',
    "camelCase snake_case UPPER lower MiXeD 3rd 2nd A4 x86_64 v1.2.3-rc4",
    "Straße, naïve café, Ærøskøbing, Łódź, İstanbul, ǆ, ﬁne ﬂow",
    "e\u0301 o\u0308 n\u0303 a\u030a (combining), é ö ñ å (composed)",
    "Широкая электрификация южных губерний даст мощный толчок, 25 рублей.",
    "Η γρήγορη αλεπού· ἐν ἀρχῇ ἦν ὁ λόγος",
    "שָׁלוֹם עולם, مرحبا بالعالم ١٢٣، می‌خواهم",
    "नमस्ते दुनिया १२३, வணக்கம், สวัสดีชาวโลก",
    "人工知能は世界を変える。中文分词,漢字かな交じり文、カタカナ ﾊﾝｶｸ",
    "안녕하세요 세계, 한국어 띄어쓰기",
    "😀 👩‍👩‍👧 🇫🇷 ☃️ ①② ½ ™ … — “quoted” ‘single’ «guillemets»",
    "∑ x² ≤ √2 · π ≈ 3.14159, ℝ → ∞, \u00a0no-break\u2003em space\u200bzero width",
    "!!! ??? ... --- *** ### ### (((a))) [[b]] {{c}} ~~~ ``` \\n \\t",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000000000000000 ................",
)
"""Texts on which two tokenizers are compared: scripts, digits, spaces, code, marks."""
_DELIBERATE = {
    "upper case": ("Word WORD of Words", "word word of words"),
    "accents": ("a café déjà vu", "a cafe deja vu"),
    "line breaks": ("one\ntwo", "one two"),
    "runs of spaces": ("one   two", "one two"),
}
"""What a tokenizer may drop on purpose, and two texts that then have the same ids."""

_log = logging.getLogger(__name__)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder or a model of the hub, and log what is to be said of it, once a process.

    Raises as `read_tokenizer`.
    """
    tokenizer, notices = read_tokenizer(name, revision)
    log_notices(notices)
    return tokenizer


def log_notices(notices: Iterable[str]) -> None:
    """Log lines about a tokenizer, each of them once a process."""
    for notice in notices:
        _log_once(notice)


@functools.cache
def _log_once(notice: str) -> None:
    _log.warning("%s", notice)


def read_tokenizer(name: str, revision: str | None = None) -> tuple[Any, list[str]]:
    """Return a fast tokenizer of transformers, and lines about it for the person.

    Its ids are those of the folder's own tokenizer.json: where the class that transformers takes makes others, the file
    is used without that class. BPE dropout, truncation and padding are off, and decoding cleans no spaces up. Code that
    a folder brings along is never run.

    Raises ValueError, with the file, for whatever is missing, damaged, or no fast tokenizer, and an EOS that is in no
    vocabulary.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file: name the folder that it lies in")
    if folder.is_dir():
        _check_files(folder)
    own = _own_file(folder / _FILE) if (folder / _FILE).is_file() else None  # before transformers meets it
    refusal: Exception | None = None
    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of any kind: what a class of transformers meets in a file that it doesn't expect
        loaded, refusal = None, error
    path = folder / _FILE if folder.is_dir() else _file_of_the_hub(name, revision)
    if own is None and path is not None and path.is_file():
        own = _own_file(path)
    if own is None or path is None:
        return _without_file(name, loaded, refusal), []
    dropout = _settle(own)
    used, notices = _as_the_file_says(name, revision, path, own, loaded, refusal)
    _check_end(path, own, used)
    used.clean_up_tokenization_spaces = False
    asked = _config_beside(path).get("add_bos_token")
    if asked is not None and bool(asked) != bool(_before_a_text(used.backend_tokenizer)):
        has = "no BOS" if asked else "BOS"
        notices.append(
            f"{path}: its template puts {has} before a text, and that counts, not add_bos_token in {_CONFIG}"
        )
    if dropout:
        notices.append(f"{path}: BPE dropout is off here, so that a text always has the same ids")
    unknown = Spelling(own).unknown
    dropped = [what for what, pair in _DELIBERATE.items() if _same_known_ids(used.backend_tokenizer, unknown, *pair)]
    if dropped:
        notices.append(f"{path}: this tokenizer keeps no {', no '.join(dropped)}: text comes back without")
    return used, notices


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """Describe a fast tokenizer for a manifest.

    Raises ValueError when it is not a fast one, has no end-of-text token, or has one that is also its unknown token
    where not every text can be spelled.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    name = str(tokenizer.name_or_path or "unnamed")
    if Path(name).is_dir():
        name = Path(name).resolve().name  # where it lay on this machine says nothing on another
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no end-of-text token, and every document is ended by one; "
            "set it: tokenizer.eos_token = '<|endoftext|>' (a token of its vocabulary)"
        )
    eos = int(tokenizer.eos_token_id)
    model = tokenizer.backend_tokenizer.model
    has_unknown = getattr(model, "unk_token", None) is not None or isinstance(model, Unigram)
    spelling = Spelling(tokenizer.backend_tokenizer) if has_unknown else None  # takes a while for a large vocabulary
    if spelling is not None and spelling.can_lose and spelling.unknown is not None and spelling.unknown[0] == eos:
        raise ValueError(
            f"tokenizer {name!r}: its end-of-text token {spelling.unknown[1]!r} is also what stands for text that it "
            "can't spell, so each such character would end the document: give it an eos_token of its own "
            f"({_CONFIG})"
        )
    highest_id = max(tokenizer.get_vocab().values())  # ids may have holes, so the count alone is not enough
    return TokenizerInfo(name, fingerprint, max(len(tokenizer), highest_id + 1), eos, document_bos(tokenizer))


def document_bos(tokenizer: Any) -> tuple[int, ...]:
    """Return what documents begin with: as prompts, unless BOS and EOS are one token, as the document before ends so.

    Raises ValueError when the tokenizer is not a fast one.
    """
    bos = _before_a_text(_backend_of(tokenizer))
    return () if bos == (tokenizer.eos_token_id,) else bos


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of everything that decides which ids a text becomes: vocabulary, merges, normaliser, ...

    Truncation, padding, BPE dropout and the post-processor (which only adds special tokens) are left out: they are
    states that people set and reset, and building uses none of them. Neither the tokenizer's path nor its name counts.
    Raises ValueError when the tokenizer is not a fast one, or knows nothing but special tokens: that is what
    transformers makes of a folder without a tokenizer's files, without a word.
    """
    backend = _backend_of(tokenizer)
    if _knows_nothing(tokenizer):
        raise ValueError(
            f"tokenizer {str(tokenizer.name_or_path or 'unnamed')!r} knows no token but "
            f"{tokenizer.all_special_tokens}: the folder has no tokenizer in it; put its files (tokenizer.json) "
            "there, or name another"
        )
    state = json.loads(backend.to_str())
    for key in ("truncation", "padding", "post_processor"):
        state.pop(key, None)
    merges = state["model"].get("merges")
    if merges:  # written as "a b" by older versions of tokenizers and as ["a", "b"] by newer ones
        state["model"]["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in merges]
    state["model"].pop("dropout", None)
    # Options that are off: a newer version of tokenizers has more of them to list.
    state["model"] = {key: value for key, value in state["model"].items() if value is not None and value is not False}
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()


def prompt_ids(tokenizer: Any, prompt: str, embeddings: int | None = None, where: str = "prompt") -> list[int]:
    """Return the ids of a text that a model is to continue, framed as a document that is not ended yet.

    Args:
        embeddings: of the model; None checks nothing.
        where: what a message calls the prompt.

    Raises ValueError when the prompt holds a token that the model has no embedding of.
    """
    backend = _backend_of(tokenizer)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    bos = list(_before_a_text(backend))
    ids = ids if ids[: len(bos)] == bos else [*bos, *ids]
    if embeddings is not None and ids and max(ids) >= embeddings:
        token = backend.id_to_token(max(ids))
        raise ValueError(
            f"{where} holds the token {token!r} (id {max(ids)}), and the base has {embeddings} embeddings (ids 0 to "
            f"{embeddings - 1}): leave that token out, or choose a base that has it"
        )
    return ids


def check_made_for(
    place: str, manifest: Manifest, tokenizer: Any, fingerprint: str, base: str, embeddings: int
) -> str | None:
    """Check that a set of shards was made with a base's tokenizer, and that the base has an embedding of all its ids.

    Returns a line for the person where its documents are framed otherwise than the base's prompts, or None.
    Raises ValueError, beginning with `place`.
    """
    found = manifest.tokenizer
    if found.fingerprint != fingerprint:
        raise ValueError(
            f"{place}: built with tokenizer {found.name!r} of fingerprint {found.fingerprint[:16]}…, {base} has "
            f"{fingerprint[:16]}…: build the shards anew with --tokenizer {base}"
        )
    if manifest.last_id >= embeddings:
        token = tokenizer.backend_tokenizer.id_to_token(manifest.last_id)
        raise ValueError(
            f"{place}: token ids up to {manifest.last_id} ({token!r}), but {base} has only {embeddings} embeddings: "
            "build the shards anew of text that has no such token, or choose a base that has it"
        )
    expected = document_bos(tokenizer)
    if found.bos_token_ids == expected:
        return None
    return (
        f"{place}: its documents begin with {_words(found.bos_token_ids, tokenizer)}, and texts of {base}'s tokenizer "
        f"with {_words(expected, tokenizer)}: build the shards anew"
    )


def _words(ids: tuple[int, ...], tokenizer: Any) -> str:
    return " ".join(repr(tokenizer.backend_tokenizer.id_to_token(id_)) for id_ in ids) or "no special token"


def _before_a_text(backend: Tokenizer) -> tuple[int, ...]:
    """Return the ids that the tokenizer's template puts before a single text."""
    if backend.post_processor is None:
        return ()
    word = Tokenizer(WordLevel({"a": 0}, unk_token="a")).encode("a")
    done = backend.post_processor.process(word, None, True)
    return tuple(done.ids[: done.special_tokens_mask.index(0)])


def _backend_of(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which building needs: convert it to a tokenizer.json"
        )
    found: Tokenizer = backend
    return found


def _knows_nothing(tokenizer: Any) -> bool:
    special = set(tokenizer.all_special_tokens)
    # Listing a large vocabulary takes a while, and its size mostly tells.
    return bool(
        tokenizer.backend_tokenizer.get_vocab_size() <= len(special) and tokenizer.get_vocab().keys() <= special
    )


def _check_files(folder: Path) -> None:
    """Raise ValueError for a file of a tokenizer that is damaged."""
    for name in (*_FILES, *(() if (folder / _FILE).exists() else _WITHOUT_FILE)):
        path = folder / name
        if not path.is_file():
            if path.is_symlink():
                raise ValueError(f"{path}: the link leads nowhere: copy the file that it stands for")
            continue
        if is_lfs_pointer(path):
            raise ValueError(
                f"{path}: expected the file, found what git leaves in its place: run `git lfs pull` in {folder}"
            )
        if not path.stat().st_size:
            raise ValueError(f"{path}: expected a tokenizer's file, found an empty one: copy it again")
        if path.suffix == ".json":
            _read_json(path)


def _read_json(path: Path) -> None:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found it damaged or cut off ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}: copy it again")


def _own_file(path: Path) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain ones
        raise ValueError(
            f"{path}: tokenizers {tokenizers.__version__} can't read it ({_first_line(error)}): copy it again if it is "
            "damaged; if a newer version of tokenizers wrote it, install that one"
        ) from None
    return backend


def _file_of_the_hub(name: str, revision: str | None) -> Path | None:
    """Return the tokenizer.json that transformers has fetched, if there is one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, _FILE, revision=revision)
    except HFValidationError:  # no name of a model
        return None
    return Path(found) if isinstance(found, str) else None


def _without_file(name: str, loaded: Any, refusal: Exception | None) -> Any:
    """Return what transformers made of other files than a tokenizer.json, settled."""
    if refusal is not None:
        if Path(name).is_dir():
            there = [file for file in _WITHOUT_FILE if (Path(name) / file).is_file()]
            if not there:
                raise ValueError(
                    f"{name}: no tokenizer in it: put its files ({_FILE}) there, or name another"
                ) from refusal
            raise ValueError(
                f"{name}: its tokenizer can't be loaded of {', '.join(there)} without a {_FILE} "
                f"({_first_line(refusal)}): put that file there"
            ) from refusal
        raise ValueError(
            f"{name}: no such local folder, and its tokenizer is not to be had from the hub: {_first_line(refusal)}"
        ) from refusal
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{name}: {type(loaded).__name__} is not a fast tokenizer: convert it to a {_FILE}, and put that there"
        )
    if _knows_nothing(loaded):
        raise ValueError(f"{name}: no tokenizer in it: put its files ({_FILE}) there, or name another")
    _settle(loaded.backend_tokenizer)
    loaded.clean_up_tokenization_spaces = False
    return loaded


def _as_the_file_says(
    name: str, revision: str | None, path: Path, own: Tokenizer, loaded: Any, refusal: Exception | None
) -> tuple[Any, list[str]]:
    """Return a tokenizer of transformers with the ids of `own`, and what is to be said of it."""
    from transformers import PreTrainedTokenizerFast

    fast = getattr(loaded, "backend_tokenizer", None) is not None
    if fast:
        _settle(loaded.backend_tokenizer)
    if fast and _same_parts(loaded.backend_tokenizer, own) and not _differing(loaded.backend_tokenizer, own):
        return loaded, []
    kind = "the class that it names" if loaded is None else type(loaded).__name__
    try:
        used = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
        missing = {key: getattr(loaded, key, None) for key in _SPECIAL if getattr(used, key, None) is None}
        missing = {key: str(token) for key, token in missing.items() if token and own.token_to_id(token) is not None}
        if missing:
            used = PreTrainedTokenizerFast.from_pretrained(name, revision=revision, **missing)
    except Exception as error:
        raise ValueError(f"{path.parent}: its tokenizer can't be loaded: {_first_line(error)}") from error
    _settle(used.backend_tokenizer)
    others = _differing(used.backend_tokenizer, own)
    if others:
        return used, [
            f"{path}: {_CONFIG} beside it changes the ids of {len(others)} of {_texts_of(own)} sample texts, for "
            f"example of {others[0]!r}: text is tokenised as both say together"
        ]
    if refusal is not None or not fast:
        why = "" if refusal is None else f" ({_first_line(refusal)})"
        if "auto_map" in _config_beside(path):
            why = " (auto_map names code in the folder, which is never run)"
        return used, [f"{path}: used without {kind}{why}"]
    if dropped := _differing(loaded.backend_tokenizer, own):
        return used, [
            f"{path}: used without {kind}, which gives other ids than the file for {len(dropped)} of {_texts_of(own)} "
            f"sample texts, for example {dropped[0]!r}"
        ]
    return used, []


def _check_end(path: Path, own: Tokenizer, used: Any) -> None:
    """Raise ValueError for an EOS that is in no vocabulary: transformers makes up an id for it, which no base knows."""
    end = used.eos_token
    declared = _config_beside(path).get("added_tokens_decoder", {}).get(str(used.eos_token_id), {})
    if end is None or own.token_to_id(end) is not None or declared.get("content") == end:
        return
    named = next((name for name in (_CONFIG, _MAP) if _config_beside(path, name).get("eos_token")), _CONFIG)
    raise ValueError(
        f"{path.with_name(named)}: eos_token: expected a token of {_FILE}, found {end!r}, which is not in it: name the "
        "one that ends a text there"
    )


def _config_beside(path: Path, name: str = _CONFIG) -> dict[str, Any]:
    config = path.with_name(name)
    found: dict[str, Any] = json.loads(config.read_bytes()) if config.is_file() else {}
    return found


def _settle(backend: Tokenizer) -> bool:
    """Switch truncation, padding and BPE dropout off; returns whether there was dropout."""
    backend.no_truncation()
    backend.no_padding()
    dropout = getattr(backend.model, "dropout", None)
    if dropout is not None:
        backend.model.dropout = None
    return bool(dropout)


def _same_parts(backend: Tokenizer, own: Tokenizer) -> bool:
    """Return whether two tokenizers have the same normalizer, pre-tokenizer and model."""
    return _parts(backend) == _parts(own)


def _parts(backend: Tokenizer) -> list[Any]:
    state = json.loads(backend.to_str())
    model = {key: value for key, value in state["model"].items() if value not in (None, False, "") and key != "dropout"}
    return [_without_offsets(state["normalizer"]), _without_offsets(state["pre_tokenizer"]), model]


def _without_offsets(part: Any) -> Any:
    """Leave out what changes where in the text a token is said to lie, and not its id."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _sample(own: Tokenizer) -> list[str]:
    added = [str(token) for _, token in sorted(own.get_added_tokens_decoder().items())][:8]
    return [*SAMPLE, *(f"a {token} b{token}c  {token}\n{token}d" for token in added)]


def _texts_of(own: Tokenizer) -> int:
    return len(_sample(own))


def _differing(backend: Tokenizer, own: Tokenizer) -> list[str]:
    """Return the sample texts that two tokenizers give other ids."""
    return [text for text in _sample(own) if _ids(backend, text) != _ids(own, text)]


def _ids(backend: Tokenizer, text: str) -> list[int] | str:
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except Exception as error:  # a tokenizer without an unknown token, say
        return str(error)


def _same_known_ids(backend: Tokenizer, unknown: tuple[int, str] | None, one: str, other: str) -> bool:
    """Return whether two texts have the same ids, none of them the unknown token's."""
    ids = _ids(backend, one)
    return bool(ids) and ids == _ids(backend, other) and (unknown is None or unknown[0] not in ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
