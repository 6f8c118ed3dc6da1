"""The patch in pure torch: gates, couplings, sidecars on a frozen model."""
