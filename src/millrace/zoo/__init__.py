"""Tasks: one file each, all of one shape (see `millrace.zoo.base` for the contract, docs/zoo.md for how to add one)."""
