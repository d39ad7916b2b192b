"""Tasks: one file each, all of one shape (the contract: `millrace.zoo.base`; how to add one: docs/zoo/README.md)."""
