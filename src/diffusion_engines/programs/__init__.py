"""Exported programs: a network as ``torch.export`` sees it, for PyTorch's own compilers.

A program has no weights, so that a fine-tune or a LoRA of the same architecture has the same
program, and what is built from it.
https://docs.pytorch.org/docs/stable/export.html
"""
