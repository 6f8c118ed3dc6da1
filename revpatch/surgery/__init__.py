"""What is done to trained patches: reverted, merged, searched, carried to other models."""
