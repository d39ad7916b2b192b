"""One framework's way to train the workloads per file; each runs as a process of its own, in its own environment."""
