"""One cache for many machines: objects fetched from a DVC remote and brought to it."""
