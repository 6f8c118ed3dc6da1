"""`python -m revpatch` is `revpatch`; launchers start it so."""

from revpatch.cli import main

main()
