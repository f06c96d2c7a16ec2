"""How far an engine's outputs are from the reference, and how far they may be."""
