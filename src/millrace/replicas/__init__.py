"""Replicas of a training step on machines that fail: who computes which slice, who holds what, who replaces whom."""
