"""Peak memory of a pipeline, in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from diffusion_engines.errors import HardwareError

# Between two looks at the GPU's memory, 0.1 ms each. Allocators keep what they once took, so that a
# peak lasts much longer.
_INTERVAL_SECONDS = 0.01


@dataclass(frozen=True)
class PeakMemory:
    """The peaks of one process, in bytes; those on a GPU are 0 where none is used.

    Attributes:
        resident: resident memory, from the process's start on: libraries, mapped files, loading.
        gpu: all that the process has on GPUs, as the driver counts it: the context, engines, what
            ONNX Runtime, TensorRT and PyTorch allocate. Sampled, every 10 ms.
        gpu_pytorch: the part of it that PyTorch's allocator gave out; engines are not in it.
    """

    resident: int
    gpu: int
    gpu_pytorch: int

    @property
    def limiting(self) -> int:
        """That of the device that runs out first: the GPUs' where one is used."""
        return self.gpu or self.resident


def peak_memory_of(function: Callable[..., None], *args: Any, gpu: bool) -> PeakMemory:
    """Run a function in a fresh process; return the peaks of that process.

    Args:
        function: picklable, as are its arguments.
        args: of the function.
        gpu: whether it uses a GPU.

    Raises:
        RuntimeError: the process failed.
        HardwareError: the driver does not tell what is on the GPU.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, args))
    with _gpu_memory() if gpu else contextlib.nullcontext(lambda pid: (0, 0)) as on_gpu:
        _, before = on_gpu(0)
        process.start()
        sender.close()
        own = grown = 0
        while not receiver.poll(_INTERVAL_SECONDS):
            of_process, of_all = on_gpu(process.pid or 0)
            own, grown = max(own, of_process), max(grown, of_all - before)
    try:
        resident, pytorch = receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"measuring memory failed: the process ended with {process.exitcode}"
        ) from error
    finally:
        process.join()
    # A container may hide its processes from the driver, or the driver their memory (WSL): then it
    # is what all GPUs hold more than before. A peak between two looks is at least PyTorch's.
    return PeakMemory(resident, max(own or grown, pytorch), pytorch)


@contextlib.contextmanager
def _gpu_memory() -> Iterator[Callable[[int], tuple[int, int]]]:
    """Yield what returns the bytes that a process has on all GPUs, and that all processes have."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

        def read(pid: int) -> tuple[int, int]:
            processes = [
                found
                for handle in handles
                for found in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            ]
            own = sum(found.usedGpuMemory or 0 for found in processes if found.pid == pid)
            return own, sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)

        yield read
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise HardwareError(
            "the driver does not tell how much memory a process has on the GPU",
            expected="NVML, as nvidia-smi uses it",
            found=str(error),
            fix="see that `nvidia-smi` works here",
        ) from error


def _run(sender: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    from diffusion_engines.progress import LOG

    function(*args)
    pytorch = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    sender.send((LOG.whole_peak_memory_bytes(), pytorch))
    sender.close()
    gc.freeze()  # spares the walk through all that was imported, as in diffusion_engines.stage
