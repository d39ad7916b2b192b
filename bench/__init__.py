"""Measures Millrace against its peers: `python -m bench`. How: `race.py`; what: `workloads.py`."""
