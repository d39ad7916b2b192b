"""The command line: a thin layer over the zoo. One file per command; `main` finds and calls it."""
