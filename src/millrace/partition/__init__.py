"""A placed graph cut into one program per device, joined by Send and Recv."""
