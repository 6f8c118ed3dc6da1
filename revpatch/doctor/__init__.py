"""What is looked at before a run: this machine, its packages, its peers."""
