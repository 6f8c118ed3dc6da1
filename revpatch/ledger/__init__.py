"""What a run leaves behind: a hash-chained journal and its patches."""
