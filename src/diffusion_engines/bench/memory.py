"""Peak memory of a pipeline, in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from typing import Any


def peak_memory_of(function: Callable[..., None], *args: Any) -> dict[str, int]:
    """Run a function in a fresh process; return its peak memory in bytes.

    ``resident`` is the process's peak resident memory, libraries and mapped files included;
    ``gpu`` is the peak that PyTorch allocated on the GPU (0 without one).

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"measuring memory failed: the process ended with {process.exitcode}"
        ) from error
    finally:
        process.join()


def _run(sender: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    from diffusion_engines.progress import peak_memory_bytes

    function(*args)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    sender.send({"resident": peak_memory_bytes(), "gpu": gpu})
    sender.close()
    gc.freeze()  # spares the walk through all that was imported, as in diffusion_engines.stage
