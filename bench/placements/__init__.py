"""Placement algorithms compared: eight graphs of full size on four clusters, planned and simulated, never run."""
