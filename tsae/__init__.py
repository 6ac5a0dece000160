"""tsae: Temporal Sparse Autoencoders on a cluster or a laptop."""

__version__ = "0.1.0"
