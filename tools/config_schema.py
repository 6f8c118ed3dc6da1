"""The JSON schema of a run's config, for editors' completion and checks: configs/schema.json.

    python tools/config_schema.py [--out FILE]

Run it after a change of revpatch/config/. Every key has its default, its bounds and its docstring as description. An
editor with a YAML language server finds it by the first line of the files in configs/; what a schema can't say (sums,
combinations of keys, `ConfigError`) is checked when the config is read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from revpatch.config import Config

PLACE = Path(__file__).resolve().parent.parent / "configs/schema.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the JSON schema of a run's config.")
    parser.add_argument("--out", type=Path, default=PLACE, help="file to write")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    parser.parse_args().out.write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
