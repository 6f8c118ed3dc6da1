"""What a patch is measured by: probes, the guard, losses, proofs."""
