"""A base as people name it: its config.json, its weights' names, shapes and types, and last the weights themselves.

    base = Base.find(name, revision)    # config.json alone; a hub's is fetched
    base.check()                        # the tensors' names, shapes and types against it; no weights are read
    model = base.load(torch.bfloat16)

What transformers would draw at random, leave out, convert or run in silence is refused. No code of a folder is run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file, find_adapter_config_file

from revpatch.durable import is_lfs_pointer
from revpatch.patch.families import FAMILIES

_log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
"""In which a base may be held, by name. Training and surgery take the first two."""

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for weights, in its order."""
_AGAIN = "copy it again from where the base came"
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""torch's names of safetensors' types; others keep their own."""
_NEVER_LEARNED = re.compile(r"\.attn\.masked_bias$")
"""Constants of GPT-2s that older versions of transformers wrote, and that this one no longer knows."""
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|weight_scale\w*|SCB|weight_packed)$")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


class BaseError(ValueError):
    """A base that can't be used; the message names the file, and says what to do."""


class BaseNotFoundError(BaseError):
    """There is no such folder, and no such name on the hub."""


@dataclass(frozen=True)
class Base:
    """A base that is there, and whose config.json can be used. Made by `find`."""

    name: str
    revision: str | None
    folder: Path
    """Where its files are; of a hub's, those that were fetched so far."""
    local: bool
    config: Any
    """As transformers reads it."""

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> Base:
        """Return the base of a folder or of a hub's name.

        Raises:
            BaseNotFoundError: there is none.
            BaseError: its config.json can't be used, or it is no plain base: quantised, an adapter, an exported patched
                model, one with code of its own, or one of a family that is not known.
        """
        folder, local = Path(name), True
        if folder.exists() and not folder.is_dir():
            raise BaseError(f"{name} is a file: name the folder that it is in")
        if not folder.is_dir():
            folder, local = _fetched(name, revision), False
        elif (folder / "adapter_config.json").exists():
            raise _adapter(folder / "adapter_config.json", alone=not (folder / _CONFIG).exists())
        said = _read_json(folder / _CONFIG, _what_is_there(folder) if local else "")
        _refuse_what_is_no_plain_base(folder / _CONFIG, said)
        _check_generation_config(folder / "generation_config.json")
        try:
            if "configuration_files" in said:  # which names another file for this version of transformers
                other = transformers.PreTrainedConfig.get_config_dict(name, revision=revision)[0]
                _refuse_what_is_no_plain_base(folder / _CONFIG, other)
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        except BaseError:
            raise
        except Exception as error:  # of any kind: its values are anybody's
            raise _bad_values(folder / _CONFIG, error) from error
        return cls(name, revision, folder, local, config)

    def check(self) -> None:
        """Hold the tensors' names, shapes and types against config.json. Weights are not read, and none is fetched.

        Raises:
            BaseError: files are missing or broken, or not of one model.
        """
        files = self._files()
        held, types = _headers(files)
        info = self._load_on_meta(held)
        if not files:  # of a hub's base, before it is fetched
            return
        odd = {name: kind for name, kind in types.items() if kind not in DTYPES}
        if odd:
            plain = self._load_on_meta({name: tensor for name, tensor in held.items() if name not in odd})
            if used := sorted(plain["missing_keys"] - info["missing_keys"]):
                raise _wrong_type(self._where(files), used, odd)
        _check_same(self._where(files), info, self.config)

    def load(self, dtype: torch.dtype) -> nn.Module:
        """Return the model on the CPU, in eval mode.

        Raises:
            BaseError: as `check`; or the weights can't be read, or some are no finite numbers.
        """
        self.check()
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.name,
                revision=self.revision,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with both shapes
            )
        except Exception as error:  # of any kind: safetensors, pickles, memory
            if not self.local:
                self.check()  # of what was fetched by now
            raise BaseError(f"{self._where(self._files())}: can't be loaded ({_told(error)}): {_AGAIN}") from error
        if not self.local:
            self.check()
        _check_same(self._where(self._files()), info, self.config)
        _check_numbers(self._where(self._files()), model)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        tied = getattr(self.config.get_text_config(), "tie_word_embeddings", False)
        if tied and head is not None and head.weight is not embeddings.weight:
            _log.warning(
                "%s: config.json says that head and embeddings are one tensor, and two that differ are there: both are "
                "used, as transformers does",
                self._where(self._files()),
            )
        return cast(nn.Module, model.eval())

    def _load_on_meta(self, held: dict[str, Tensor]) -> dict[str, Any]:
        """Return what transformers would miss, leave over and find in another shape, from tensors without contents: its
        own loader knows best what is tied, renamed, or may be left out."""
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        try:
            with _quiet():
                _, info = kind.from_pretrained(
                    None,
                    config=self.config,
                    state_dict=held,
                    device_map={"": "meta"},
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # of any kind: a division by zero, a name that no table has
            raise _bad_values(self.folder / _CONFIG, error) from error
        return cast(dict[str, Any], info)

    def _where(self, files: list[Path]) -> Path | str:
        """Return what people are told to look at: the file of weights, or the index of several."""
        if len(files) == 1:
            return files[0]
        return next((self.folder / name for name in _WEIGHTS if (self.folder / name).exists()), self.name)

    def _files(self) -> list[Path]:
        """Return the files that transformers will read weights from; none of a hub's base that was not fetched."""
        named = getattr(self.config, "transformers_weights", None)
        if not isinstance(named, str | None):
            raise BaseError(f"{self.folder / _CONFIG}: expected a file's name as transformers_weights, found {named!r}")
        if self.local and any(_DISTRIBUTED.fullmatch(path.name) for path in self.folder.iterdir()):
            raise BaseError(
                f"{self.folder} holds a checkpoint in parts of a distributed model (shard-…-model-….safetensors): load "
                "it where it was made, and write it with save_pretrained"
            )
        for name in _WEIGHTS if named is None else (named,):
            path = self.folder / name
            if not path.exists() and not path.is_symlink():
                continue
            if name.endswith(".index.json"):
                return _shards(path, self.local)
            _check_file(path)
            return [path]
        if not self.local:
            return []
        raise BaseError(
            f"{self.folder}: no weights are there: expected {named or ' or '.join(_WEIGHTS[::2])}, found "
            f"{_listed(self.folder)}{_what_is_there(self.folder)}"
        )


def load_base(name: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    """Return a base in eval mode, on the CPU; raises as `Base.find` and `Base.load`."""
    return Base.find(name, revision).load(dtype)


def _fetched(name: str, revision: str | None) -> Path:
    """Return the folder of a hub's base in the cache, with its config.json."""
    try:
        validate_repo_id(name)
    except ValueError as error:  # its words are of names on the hub, and of an argument that we don't have
        raise BaseNotFoundError(
            f"no such local folder (looked for {Path(name).absolute()}), and no name that the hub could have, which is "
            "ORGANISATION/NAME: correct the path"
        ) from error
    try:
        adapter = find_adapter_config_file(name, revision=revision)  # which transformers would put on in silence
        path = None if adapter else cached_file(name, _CONFIG, revision=revision)
    except (OSError, ValueError) as error:
        raise BaseNotFoundError(f"no such local folder, and not to be had from the hub: {_told(error)}") from error
    if adapter is not None:
        raise _adapter(Path(adapter), alone=not (Path(adapter).parent / _CONFIG).exists())
    return Path(cast(str, path)).parent


# config.json


def _read_json(path: Path, hint: str = "") -> dict[str, Any]:
    _check_file(path, hint)
    if path.read_bytes().startswith(b"\xef\xbb\xbf"):  # which transformers can't read
        raise BaseError(f"{path} begins with a byte order mark, as some editors write it: save it as UTF-8 without one")
    try:
        said = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise BaseError(f"{path}: no JSON, so truncated or damaged ({_told(error)}): {_AGAIN}") from error
    if not isinstance(said, dict):
        raise BaseError(f"{path}: expected keys and values, found a {type(said).__name__}: {_AGAIN}")
    return said


def _constant(name: str) -> float:
    if name == "NaN":  # infinities have uses
        raise ValueError("NaN is no number that a model can be made of")
    return float(name.replace("Infinity", "inf"))


def _check_file(path: Path, hint: str = "") -> None:
    """Raise BaseError unless `path` is a file with something in it."""
    if path.is_dir():
        raise BaseError(f"{path} is a folder, and should be a file: {_AGAIN}")
    if path.is_symlink() and not path.exists():
        raise BaseError(f"{path} is a link to {path.readlink()}, which is not there: {_AGAIN}")
    if not path.exists():
        raise BaseError(f"{path} is not there{hint}: name a folder that has it")
    if is_lfs_pointer(path):
        raise BaseError(f"{path} is a git-LFS pointer and not the file itself: run `git lfs pull` in {path.parent}")
    if path.stat().st_size == 0:
        raise BaseError(f"{path} is empty: {_AGAIN}")


def _refuse_what_is_no_plain_base(path: Path, said: dict[str, Any]) -> None:
    kind = said.get("model_type")
    if "revpatch" in said:
        raise BaseError(f"{path}: this is an exported patched model; its base is {_base_of(said)}: name that instead")
    for key in ("quantization_config", "compression_config"):
        if (found := said.get(key)) is not None:
            raise BaseError(
                f"{path}: {key} says that the weights are quantised ({_method_of(found)}), and a base is held in "
                "bfloat16 or float32: name the model that was quantised, or dequantise this one with the library that "
                "made it and write it with save_pretrained"
            )
    for key in ("auto_map", "attn_implementation", "_attn_implementation"):
        if (own := said.get(key)) and (key == "auto_map" or "/" in str(own)):  # the others may name a hub's kernels
            raise BaseError(
                f"{path}: {key} names code of its own ({_named_code(own)}), and code of a model is never run: name a "
                f"model whose class is in transformers; if this one's is, take {key} out of the file"
            )
    if not isinstance(kind, str):
        raise BaseError(f"{path}: expected a name as model_type, found {kind!r}: {_AGAIN}")
    if kind not in FAMILIES:
        raise BaseError(
            f"{path}: models of type {kind!r} have no row in FAMILIES (revpatch/patch/families.py); known are "
            f"{', '.join(sorted(FAMILIES))}"
        )


def _check_generation_config(path: Path) -> None:
    """Raise BaseError if a file that says how to generate is there and broken, which transformers passes over."""
    if not path.exists():
        return
    said = _read_json(path)
    try:
        transformers.GenerationConfig.from_dict(said)
    except Exception as error:  # of any kind: its values are anybody's
        raise BaseError(f"{path}: its values can't be used ({_told(error)}): correct them, or {_AGAIN}") from error


def _base_of(exported: dict[str, Any]) -> str:
    """Return name and sha256 of an exported model's base."""
    try:
        base = exported["revpatch"]["entry"]["base"]
        return f"{base['model']} (sha256 {str(base.get('sha256'))[:16]}…)"
    except (AttributeError, KeyError, TypeError):
        return "not named there"


def _method_of(quantisation: Any) -> str:
    """Return the name of a method, which older files give only by its bits."""
    if not isinstance(quantisation, dict):
        return str(quantisation)
    bits = any(quantisation.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    return str(quantisation.get("quant_method") or ("bitsandbytes" if bits else "by a method that has no name there"))


def _named_code(own: Any) -> str:
    found = own.values() if isinstance(own, dict) else [own]
    return ", ".join(dict.fromkeys(str(value).partition(".")[0] for value in found))[:100]


def _adapter(path: Path, alone: bool) -> BaseError:
    """Return the refusal of a PEFT adapter, or of a base that has one beside it."""
    try:
        named = f" of {json.loads(path.read_bytes())['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        named = ""
    if alone:
        return BaseError(f"{path}: this is a PEFT adapter{named}, and no base: name its base, or merge the two first")
    return BaseError(
        f"{path}: a PEFT adapter{named} is beside the base: merge it (merge_and_unload, then save_pretrained), or name "
        "a folder of the base without it"
    )


def _bad_values(path: Path, error: Exception) -> BaseError:
    return BaseError(f"{path}: no model can be made of its values ({_told(error)}): correct them, or {_AGAIN}")


# weights


def _shards(index: Path, local: bool) -> list[Path]:
    """Return the files that an index names; of a hub's base, none unless all were fetched."""
    said = _read_json(index)
    for key in ("weight_map", "metadata"):
        found = said.get(key)
        if not isinstance(found, dict) or (key == "weight_map" and not found):
            raise BaseError(f"{index}: expected keys and values as {key}, found {found!r}: {_AGAIN}")
    names = said["weight_map"].values()
    if not all(isinstance(name, str) for name in names):
        raise BaseError(f"{index}: expected the names of files in weight_map, found {set(map(str, names))}: {_AGAIN}")
    files = [index.parent / name for name in sorted(set(names))]
    missing = [path for path in files if not path.exists()]
    if missing and not local:
        return []
    if missing:
        raise BaseError(
            f"{index} names {missing[0].name}, which is not there ({len(missing)} of {len(files)} files are missing): "
            "copy the missing from where the base came"
        )
    for path in files:
        _check_file(path)
    return files


def _headers(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of some files without their contents, and their types, by name."""
    held: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    homes: dict[str, Path] = {}
    for path in files:
        for name, (shape, kind) in _header(path).items():
            if name in held and not torch.equal(_read(homes[name], name), _read(path, name)):
                raise BaseError(
                    f"{name} is there twice, with other values, in {homes[name]} and {path}: copy both again from "
                    "where the base came"
                )
            held[name], types[name], homes[name] = torch.empty(shape, device="meta"), kind, path
    return held, types


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of each tensor of a file."""
    if path.suffix != ".safetensors":
        return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in _unpickled(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return {
                name: (tuple(piece.get_shape()), _TYPES.get(piece.get_dtype(), piece.get_dtype()))
                for name, piece in pieces.items()
            }
    except Exception as error:  # of safetensors' own kinds
        raise _damaged(path, error) from error


def _read(path: Path, name: str) -> Tensor:
    if path.suffix != ".safetensors":
        return _unpickled(path)[name]
    with safe_open(path, framework="pt") as file:
        return cast(Tensor, file.get_tensor(name))


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save; their contents stay on the disk until they are used."""
    try:
        # Files from before torch 1.6 can't be mapped.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of any kind: unpickling, zip, torch
        raise _damaged(path, error) from error
    if not isinstance(held, dict):
        raise BaseError(f"{path}: expected tensors by their names, found a {type(held).__name__}: {_AGAIN}")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BaseError(
                f"{path}: expected nothing but tensors by their names, found {name!r}, of type "
                f"{type(tensor).__name__}: it is no file of weights alone; write the model with save_pretrained"
            )
    return cast(dict[str, Tensor], held)


def _damaged(path: Path, error: Exception) -> BaseError:
    if "weights_only" in str(error) and "Unsupported" in str(error):
        return BaseError(f"{path}: more than tensors is in it, and nothing in it was run: {_AGAIN}")
    return BaseError(f"{path}: truncated or damaged ({_told(error)}): {_AGAIN}")


def _wrong_type(where: Path | str, used: list[str], odd: dict[str, str]) -> BaseError:
    found = {kind for name, kind in odd.items() if any(name.endswith(u) or u.endswith(name) for u in used)}
    kinds = ", ".join(sorted(found or set(odd.values())))
    return BaseError(
        f"{where}: expected floating-point numbers in {_some(used)}, found {kinds}: the weights are quantised, or no "
        "weights; name the model that was quantised"
    )


def _check_same(where: Path | str, info: dict[str, Any], config: Any) -> None:
    """Raise BaseError if tensors are missing, left over or of another shape, in what transformers says of a loading."""
    missing = sorted(info["missing_keys"])
    left = sorted(name for name in info["unexpected_keys"] if not _NEVER_LEARNED.search(name))
    shapes = sorted(info["mismatched_keys"])
    if not missing and not left and not shapes:
        return
    told = []
    if missing:
        told.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if left:
        told.append(f"config.json has no place for {_some(left)}")
    if shapes:
        told += [
            f"{name} has shape {tuple(found)}, config.json asks for {tuple(due)}" for name, found, due in shapes[:3]
        ]
        told[-1] += f" ({len(shapes)} tensors have another shape)" if len(shapes) > 1 else ""
    if missing == ["lm_head.weight"] and not getattr(config, "tie_word_embeddings", False):
        todo = "if head and embeddings are one tensor, set tie_word_embeddings: true in config.json"
    elif wrapper := _wrapper_of(missing, left):
        todo = f"all names begin with {wrapper!r}, as a wrapper writes them: write the bare model with save_pretrained"
    elif not any("CausalLM" in str(kind) or "LMHead" in str(kind) for kind in _kinds(config)) and not shapes:
        todo = f"config.json says that this is {' or '.join(_kinds(config))}: name a model that predicts the next token"
    elif any(_QUANTISED.search(name) for name in left):
        todo = "the weights look quantised: name the model that was quantised"
    else:
        todo = "weights and config.json are not of one model; copy both again from where the base came"
    raise BaseError(f"{where}: {'; '.join(told)}: {todo}")


def _wrapper_of(missing: list[str], left: list[str]) -> str:
    """Return what DDP, torch.compile or PEFT has put before the names of all tensors; "" if nothing."""
    first = min((len(name) - len(due) for name in left for due in missing if name.endswith(f".{due}")), default=0)
    wrapper = left[0][:first] if left else ""
    return wrapper if wrapper and {name.removeprefix(wrapper) for name in left} <= set(missing) else ""


def _kinds(config: Any) -> list[str]:
    """Return the classes that config.json names; that of a causal language model if it names none."""
    named = getattr(config, "architectures", None)
    return [str(kind) for kind in named] if isinstance(named, list) and named else ["CausalLM"]


def _check_numbers(where: Path | str, model: nn.Module) -> None:
    """Raise BaseError for numbers that are not finite, and for embeddings of nothing but zeros: a download that stopped
    leaves zeros where it had not come to. Other matrices of zeros, which added blocks begin with, are warned of."""
    empty = []
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        least, most = torch.aminmax(parameter.detach())
        if not (least.isfinite() and most.isfinite()):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise BaseError(f"{where}: {name} holds numbers that are not finite in {kind}: {_AGAIN}")
        if parameter.dim() > 1 and least == most == 0:
            empty.append(name)
    embeddings = cast(Any, model).get_input_embeddings().weight
    if any(model.get_parameter(name) is embeddings for name in empty):
        raise BaseError(f"{where}: {_some(empty)} hold nothing but zeros, as where a download stopped: {_AGAIN}")
    if empty:
        _log.warning("%s: %s hold nothing but zeros; if nobody made the base so, %s", where, _some(empty), _AGAIN)


# words


def _some(names: list[str]) -> str:
    """Return the first names of a list, and how many there are."""
    return ", ".join(names[:3]) + (f" and others ({len(names)} tensors)" if len(names) > 3 else "")


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") or "nothing"


def _what_is_there(folder: Path) -> str:
    """Return a few words on a folder that is of another kind than a base's."""
    if (folder / "patch_config.json").exists():
        return f" ({folder / 'patch_config.json'}: this is a patch, which has a base of its own)"
    if (folder / "ledger").is_dir():
        return " (this is a run, whose base is named in its config.yaml)"
    return "" if (folder / _CONFIG).exists() else f" (the folder holds {_listed(folder)})"


def _told(error: Exception) -> str:
    """Return an error in one line, with its type where its words alone say little."""
    words = " ".join(str(error).split())[:300]
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.startswith("huggingface")
    return words if plain and words else f"{type(error).__name__}: {words}".removesuffix(": ")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting, in a table of its own, what is refused in a line."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
