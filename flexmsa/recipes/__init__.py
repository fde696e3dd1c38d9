"""Training to start from: see docs/distributed.md, "A trainer to start from"."""
