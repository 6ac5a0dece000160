"""Several processes that work together: meeting, what they ask of each other, leaving."""
