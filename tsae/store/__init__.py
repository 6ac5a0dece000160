"""Activations on disk: layout, writer, harvest, reader, verification, and the stream of pairs for training."""
