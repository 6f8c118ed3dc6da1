"""Config files for tests: a minimal one, changed key by key, and what is said when one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from revpatch.config import ConfigError
from revpatch.config.file import load_config

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "base": {"model": "gpt2"},
    "replay": {"base": "data/base"},
    "phases": [{"name": "wiki", "shards": "data/wiki", "steps": 500}, {"name": "news", "shards": "n", "steps": 300}],
}


def write(tmp_path: Path, data: Any, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(data) if name.endswith(".json") else yaml.safe_dump(data), encoding="utf-8")
    return path


def merged(**sections: Any) -> dict[str, Any]:
    return {
        **MINIMAL,
        **{key: MINIMAL.get(key, {}) | value if isinstance(value, dict) else value for key, value in sections.items()},
    }


def refusal(tmp_path: Path, data: dict[str, Any], overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, data), overrides)
    return str(caught.value)


def refusal_of(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)
