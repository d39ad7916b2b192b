"""Pictures of graphs: boxes, where they stand, how lines run between them, and SVG."""
