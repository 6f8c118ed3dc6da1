"""Token shards: on disk, read, and in which order."""
