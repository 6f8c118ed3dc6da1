"""What became of a run, on one page: the validation checklist, every corpus after every phase, curves, samples."""
