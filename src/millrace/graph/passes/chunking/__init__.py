"""The parts of `time_chunks`."""
