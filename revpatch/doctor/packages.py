"""Versions of what a run needs, against what the package asks for."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from revpatch.doctor.finding import Finding

SHOWN = ("torch", "transformers", "deepspeed", "accelerate")


def asked() -> list[str]:
    """The requirements of the installed package, without its extras.

    Raises:
        PackageNotFoundError: it is run from its source.
    """
    return [each for each in metadata.requires("revpatch") or [] if "extra ==" not in each]


def versions(
    requirements: Callable[[], Sequence[str]] = asked, version: Callable[[str], str] = metadata.version
) -> Finding:
    """Holds what is installed against the requirements."""
    try:
        wanted = [Requirement(each) for each in requirements()]
    except metadata.PackageNotFoundError:
        return Finding("versions", "yellow", "revpatch runs from its source", "pip install -e . in the checkout")
    missing, other = [], []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found}, not {requirement.specifier}")
    if missing:
        return Finding("versions", "red", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if other:
        advice = "install what is asked for; the tests were not run with these"
        return Finding("versions", "yellow", "; ".join(other), advice)
    shown = [f"{name} {version(name)}" for name in SHOWN]
    return Finding("versions", "green", ", ".join([f"python {platform.python_version()}", *shown]))
