"""One placement algorithm a file, all of one contract: `base.py`."""
