"""Learning against forgetting, a line a method and rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare_cells import Result
from compare_curves import curve_of, phases_of
from compare_figures import grouped
from compare_tiers import OWN, Tier


def plot(tier: Tier, results: Sequence[Result], file: Path) -> None:
    """A panel a phase: how much the taught corpora's losses have fallen, and by how much that of the base's own text
    has risen, at each checkpoint of each rate and seed; a colour a method, a mark where a phase ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = list(tier.corpora)
    figure, panels = pyplot.subplots(1, len(corpora), figsize=(6 * len(corpora), 5), squeeze=False)
    for number, (variant, by_seed) in enumerate(grouped(results).items()):
        named = False
        for result in (result for of_seed in by_seed.values() for result in of_seed if not result["diverged"]):
            for phase in range(min(phases_of(result), len(corpora))):
                curve = curve_of(result, corpora, OWN, phase)
                panel = panels[0][phase]
                label = None if named or phase else variant
                panel.plot(*zip(*curve, strict=True), color=f"C{number % 10}", alpha=0.6, linewidth=1, label=label)
                panel.plot(*curve[-1], marker="os^Dv<>*"[number // 10 % 8], color=f"C{number % 10}", markersize=4)
            named = True
    for panel, corpus in zip(panels[0], corpora, strict=True):
        panel.set_title(f"{tier.name}, after {corpus}")
        panel.set_xlabel("learned: fall of the taught corpora's loss, nats/token")
        panel.set_ylabel("forgotten: rise of own text's loss, nats/token")
        panel.set_yscale("symlog", linthresh=0.02)  # methods differ by powers of ten
        panel.axhline(0, color="grey", linewidth=0.5)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
