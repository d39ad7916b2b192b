"""Wide layers in blocks that are ordinary nodes: `split.split`."""
