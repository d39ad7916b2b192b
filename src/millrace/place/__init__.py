"""Where the nodes of a graph run: clusters, hints, costs, the simulator, and algorithms that search for a placement."""
