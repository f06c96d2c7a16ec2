"""``diffusion-engines doctor``: what of TensorRT works on this machine, found out step by step.

For the first person with a GPU that nobody has tried: a toy network goes the whole way, through
each builder, runtime and wrap, beside PyTorch, and what came of it is written as a page and as JSON
to send back. Each check runs in a process of its own, so that one that crashes ends none of the
others.
"""
