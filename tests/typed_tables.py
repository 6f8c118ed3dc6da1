"""Every block that README.md and docs/ show: how test_typed_docs.py types it, or why it does not, and the test that
runs its like."""

from __future__ import annotations

SHORT = "--set base.model=base_model --set base.dtype=float32 --set base.block_size=16 --set sidecar.bottleneck=8"
SHORT += " --set phases.0.steps=4 --set optimizer.warmup_steps=1 --set probes.every=2 --set batch.new_blocks=4"
SHORT += " --set batch.replay_blocks=4 --set batch.micro_blocks=4 --set monitoring.samples.max_new_tokens=2"
SHORT += " --set probes.sets.0.tolerance=1 --set rollback.max_drift=2 --set replay.own_blocks=32"
FEW = " --max-new-tokens 2"

INSTEAD: dict[str, dict[str, str]] = {
    "README.md": {
        r"--tokenizer gpt2": "--tokenizer base_model",  # the hub's; the toy base is a folder
        r"--block-size 1024": "--block-size 16",  # the toy base has 64 positions
        r"(train configs/gpt2_own_text.yaml)": rf"\1 {SHORT}",  # of hours, on the hub's GPT-2
        r"train CONFIG": f"train configs/gpt2_own_text.yaml {SHORT}",  # the reader's own
        r"(generate .*--compare)": rf"\1{FEW}",  # the toy base has room for few
    },
    "docs/CORPORA.md": {
        r"--tokenizer NAME": "--tokenizer base_model",
        r"\[--block-size 1024\]": "--block-size 16",
        r"SOURCE\.\.\.": "mine.jsonl general.jsonl",
        r"FOLDER": "data/both",
        r"\[--text-column text\]": "--text-column text",  # brackets: may be left out
        r"\[--holdout 0.05\]": "--holdout 0.05",
        r"\[--max-tokens N\]": "--max-tokens 2000",
        r"\[--shard-mb 64\]": "--shard-mb 64",
        r"\[--workers N\]": "--workers 2",
        r"\[--on-bad stop\|skip\]": "--on-bad skip",
        r"\[--max-lost 0.01\]": "--max-lost 0.01",
        r"hf:wikitext/wikitext-103-raw-v1:train": "data/general",  # of the hub
    },
    "docs/LEDGER.md": {
        r"\bRUN\b": "runs/a",
        r"\bREF\b": "runs/a@good~1",
        r"\bA B\b": "runs/a@start runs/a",
        r"\[--head SHA256\] \[--no-hash\]": "--no-hash",  # brackets: may be left out; a head is what a run's log prints
        r"train CONFIG": "train config.yaml",
        r"\[--dry-run\]": "--dry-run",
    },
    "docs/PATCHES.md": {
        r"FILE_OR_FOLDER": "runs/demo/ledger/000_wiki_commit.safetensors",
        r"(revpatch generate .*?)(  +#|$)": rf"\1{FEW}\2",
    },
    "docs/RUNS.md": {r"\bRUN\b": "runs/a", r"\[--html\] \[--out FILE\] \[--json\]": "--html --out page.html --json"},
    "docs/SURGERY.md": {
        r"--base gpt2": "--base base_model",  # the hub's
        r"\[--above 3.45\]": "",  # of other numbers than a toy's
        r"\bPHASE\b": "wiki",
        r"--layers 3,7": "--layers 0,1",  # the toy base has two
    },
}
"""For each document patterns, and what is typed in their place; upper case is the reader's to choose."""

ELSEWHERE = {
    "README.md: bash launch/demo.sh": ("minutes", "tests/test_demo.py::test_the_demo_reaches_its_figures"),
    "README.md: deepspeed --num_gpus 8 --module revpatch train CONFIG": (
        "GPUs",
        "tests/launch/test_one_host.py::test_accelerate_starts_the_ranks",
    ),
    "docs/OPERATIONS.md: # two nodes: on each of them, with NODE 0 and 1, and HOST the name of node 0": (
        "two nodes",
        "tests/launch/test_two_hosts.py::test_torchrun_meets_and_starts_a_dead_rank_again",
    ),
    "docs/CONTRIBUTING.md: bash tests/run.sh": (
        "it runs this test",
        "tests/test_typed_docs.py::test_the_tests_that_contributing_names_are_there",
    ),
    "docs/EVIDENCE.md: python tools/compare.py tiny --json tiny.json --plot tiny.png": (
        "hours",
        "tests/tools/test_compare.py::test_the_smallest_comparison_ends_with_its_table_and_is_not_run_twice",
    ),
    "docs/OPERATIONS.md: revpatch doctor": (
        "measures for a minute",
        "tests/doctor/test_doctor.py::test_ranks_of_this_machine",
    ),
    "docs/OPERATIONS.md: torchrun --nproc_per_node 2 -m revpatch train configs/gpt2_smoke_files.yaml": (
        "a minute",
        "tests/test_config.py::test_one_that_needs_no_hub_trains",
    ),
    "docs/OPERATIONS.md: accelerate launch --config_file launch/accelerate.yaml --num_processes 8 --module revpatch "
    "train CONFIG": ("GPUs", "tests/launch/test_one_host.py::test_accelerate_starts_the_ranks"),
    "docs/OPERATIONS.md: sbatch launch/slurm.sbatch configs/gpt2_xl_8gpu.yaml": (
        "Slurm",
        "tests/launch/test_slurm.py::test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on",
    ),
    "docs/PATCHES.md: python tools/sample_outputs.py RUN --out page.md": (
        "the benchmark takes minutes",
        "tests/cli/test_generate_cli.py::test_a_page_shows_what_each_commit_writes",
    ),
    "docs/PERFORMANCE.md: python tools/gpu_check.py --json gpu.json": (
        "a GPU",
        "tests/test_tools.py::test_the_shortest_rehearsal_of_a_gpus_check",
    ),
    "docs/RUNS.md: tensorboard --logdir runs --samples_per_plugin text=1000": (
        "a server",
        "tests/test_in_browser.py::test_the_first_page_answers_with_the_numbers_of_the_log",
    ),
    'docs/SURGERY.md: model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)': (
        "a process that can't import revpatch",
        "tests/surgery/test_export.py::test_without_revpatch_the_folders_load_and_are_the_patched_model_to_the_bit",
    ),
}
"""Blocks that are not typed here: why, and the test that runs their like."""

SHOWN = {
    "README.md: runs/NAME/",
    "docs/design/DATA.md: text ─► documents ─► token blocks ─► shards (tars) + manifest ─► lanes ─► this rank's part of step k",  # noqa: E501
    "docs/design/MATHS.md: block l of the frozen base ──► u ─┬─────────────────────────────────────► + ──► h ──► block l + 1",  # noqa: E501
    "docs/design/MATHS.md: C:",
    "docs/design/MATHS.md: L = LM(new) + replay_loss_weight·LM(replay) + distill_kl_weight·T²·KL(teacher ‖ student on replay)",  # noqa: E501
    "docs/design/RANKS.md: rank 0",
    "docs/design/RESUME.md: step ──► snapshot (patch, moments, last good state, journal's head) ──► kill",
    "docs/LEDGER.md: RUN/ledger/",
    "docs/LEDGER.md: #8",
    "docs/RUNS.md: RUN/",
    "docs/RUNS.md: average",
}
"""Blocks that nobody types: trees of folders, formulae, what a command prints."""

TYPED: dict[str, list[str]] = {
    "README.md: source .venv/bin/activate": [
        "data/mine: ",
        "commit 000_mine_commit.safetensors",
    ],
    'README.md: revpatch generate --patch runs/gpt2_own_text --prompt "Once" --compare': [
        "learned",
        "plasticity",
        "000_mine_commit.safetensors",
        "journal",
        "can be removed",
    ],
    "docs/CORPORA.md: revpatch shards build SOURCE... --tokenizer NAME --out FOLDER [--text-column text] "
    "[--holdout 0.05] [--max-tokens N]": ["data/both", "data/both", "data/both"],
    "README.md: revpatch train CONFIG": ["is over", "Nothing was overwritten", "commit 000_mine_commit.safetensors"],
    "docs/LEDGER.md: revpatch ledger log RUN": ["000_wiki_commit.safetensors"],
    "docs/LEDGER.md: revpatch ledger show REF": ["000_wiki_good"],
    "docs/LEDGER.md: revpatch ledger diff A B": ["cosine"],
    "docs/LEDGER.md: revpatch ledger verify RUN [--head SHA256] [--no-hash]": ["journal"],
    "docs/LEDGER.md: revpatch ledger restore runs/a@000_wiki_commit --as-new-run runs/b": [
        "runs/b",
        "000_wiki_commit.safetensors",
    ],
    "docs/LEDGER.md: revpatch ledger prune RUN --keep 1 [--dry-run]": ["000_wiki_good"],
    'docs/PATCHES.md: revpatch generate --patch runs/demo --prompt "Once"': [
        "Once",
        "Once",
        "[prompt 4 of 4, sample 3 of 3]",
        "learned",
        '"texts"',
    ],
    "docs/RUNS.md: revpatch report RUN [--html] [--out FILE] [--json]": ['"plasticity"'],
    "docs/SURGERY.md: revpatch probe --patch runs/mine --shards data/general_probe data/mine_probe": [
        "mine_probe",
        "perplexity",
    ],
    "docs/SURGERY.md: revpatch ledger verify runs/mine --removal": ["can be removed"],
    "docs/SURGERY.md: revpatch ledger bisect runs/mine --shards data/general_probe [--above 3.45]": [
        "000_wiki_start.safetensors"
    ],
    "docs/SURGERY.md: revpatch ledger revert runs/mine PHASE": ["commit", "commit"],
    "docs/SURGERY.md: revpatch ledger merge runs/a runs/b --weights 0.5,0.5 --out runs/merged": ["runs/merged"],
    "docs/SURGERY.md: revpatch ledger export runs/mine --to safetensors --out patch": [
        "patch",
        "torch_patch",
        "model",
        "runs/other",
    ],
}
"""Blocks of commands, and words of what each command prints."""

REFUSALS = {"Nothing was overwritten"}
"""Those of them with which a command exits with 2, as the document says."""

LEFT_OUT = {
    "source ": "tests/test_setup.py::test_a_failed_install_stops_the_set_up_and_is_tried_again",
    "tensorboard ": "tests/test_in_browser.py::test_the_first_page_answers_with_the_numbers_of_the_log",
    "torchrun ": "tests/surgery/test_losses.py::test_two_ranks_share_the_blocks_and_find_the_same",
}
"""How lines of those blocks begin that are not typed, and the test that runs their like."""
