"""One optimizer step: batch, teacher, frozen base, loss, engine."""
