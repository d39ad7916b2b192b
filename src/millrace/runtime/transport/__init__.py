"""How a tensor gets from one device's worker to another's: one file per way, `base.py` for what holds of all."""
