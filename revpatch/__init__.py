"""revpatch: teach a frozen causal language model new corpora, one after another, as a small removable patch."""
