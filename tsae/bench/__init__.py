"""`tsae bench`: what a training step costs on this machine, against the dense path, the floor and other libraries."""
