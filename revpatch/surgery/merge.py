"""Two patches of one base made one: `revpatch ledger merge A B`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from revpatch.ledger.references import read_patch
from revpatch.surgery.arithmetic import check_finite, weighted
from revpatch.surgery.judgement import Probes, judge
from revpatch.surgery.new_entry import Made, claimed, write
from revpatch.surgery.subject import Subject, check_one_kind, of_base


def merge(
    references: tuple[str, str],
    weights: tuple[float, float],
    out: Path,
    shards: list[str] | None = None,
    base: str | None = None,
    blocks: int | None = None,
    force: bool = False,
) -> Made:
    """Makes wa·A + wb·B, parameter by parameter, probes it, and writes it as a commit if the guard agrees.

    In each set it is held against the worse of the two: a merge lies between its parents in what each alone has
    learned, and is refused where it is worse than both.

    Args:
        references: FILE, RUN or RUN@REF each; of one base, sidecar config and shape.
        weights: wa, wb. They are taken as they are: (0.5, 0.5) is the mean, (1, 1) the sum.
        out: a run, whose ledger gets the new commit, or a folder that is not there yet, which gets a ledger.
        shards, base, blocks: as in `probe`; without shards, the probe sets of A's run.
        force: write against the guard's verdict.

    Raises:
        ValueError, OSError: the patches don't go together, or not with those in `out`; as `Probes.of`, `HeldOut`.
    """
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"--weights {weights[0]},{weights[1]}: expected two finite numbers that are not both 0")
    a, b = (of_base(read_patch(reference)) for reference in references)
    check_one_kind(a, b)
    run = None if a.ledger is None else a.ledger.directory.parent
    probes = Probes.of(run, shards or [], blocks)
    subject = Subject.of(references[0], base)
    tensors = weighted([a.tensors, b.tensors], weights)
    check_finite(tensors, f"the merge of {a.reference} and {b.reference}")
    parents, after = [subject.patch_of(a), subject.patch_of(b)], subject.patch_from(a, tensors)
    judgement = judge(probes, subject, parents, after, {s.name for s in probes.sets})
    made_by: dict[str, Any] = {
        "operation": "merge",
        "parents": [a.sha256, b.sha256],
        "weights": list(weights),
    }
    if not judgement.agrees and not force:  # before a folder is made
        return Made(str(out), made_by, False, judgement.reason, judgement.sets)
    with claimed(out, create=True) as ledger:
        if (newest := ledger.newest()) is not None:
            check_one_kind(of_base(ledger.read(newest.name)), a)
        return write(ledger, "merge", tensors, a, made_by, judgement, force)
