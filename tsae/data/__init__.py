"""Text: corpora (embedded, local files, hub) and their cutting into contexts of tokens."""
