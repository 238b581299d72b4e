"""One adapter for each peer, every one a program of its own; see `job`."""
