"""What many workers would do, by simulation: the ways to agree, on a network that servers and workers share."""
