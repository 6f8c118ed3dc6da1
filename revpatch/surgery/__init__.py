"""What is done to trained patches: measured, proved absent, searched, undone, merged, carried to other models."""
