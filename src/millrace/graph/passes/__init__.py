"""Named rewrites, `Graph -> Graph`. Each keeps what the graph computes, or says in its name what it changes."""
