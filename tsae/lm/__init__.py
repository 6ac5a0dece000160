"""Language models: loading, hook points, reading and replacing the residual stream; the embedded GPT-NeoX."""
