"""All checks, in order, and what each builds on."""

from __future__ import annotations

from diffusion_engines.backends.nvidia.settings import Wrap
from diffusion_engines.doctor import engines, machine
from diffusion_engines.doctor.findings import Check

_WRAPS: dict[Wrap, str] = {"torchscript": "TorchScript", "exported_program": "exported program"}


def _wraps(name: str, title: str) -> tuple[Check, ...]:
    """Return the checks that wrap and run the engine of a builder, as each kind of file."""
    found = []
    for kind, words in _WRAPS.items():
        wrap, needs = f"{name}_{kind}", (f"{name}_build", "tensorrt", "torch_tensorrt")
        found += [
            Check(wrap, f"{title}: {words}", engines.wrap_check(name, kind), needs),
            Check(
                f"{wrap}_run",
                f"{title}: run the {words}",
                engines.wrapped_check(name, kind),
                (wrap,),
            ),
        ]
    return tuple(found)


CHECKS = (
    Check("gpu", "GPU", machine.check_gpu),
    Check("driver", "driver", machine.check_driver),
    Check("libraries", "libraries", machine.check_libraries),
    Check("trtexec", "trtexec", machine.check_trtexec),
    Check("tensorrt", "TensorRT, Python", machine.check_tensorrt),
    Check("tensorrt_rtx", "TensorRT-RTX", machine.check_tensorrt_rtx),
    Check("torch_tensorrt", "torch-tensorrt", machine.check_torch_tensorrt),
    Check("export", "export of the toy network", engines.check_export),
    Check("onnxruntime", "ONNX Runtime, CPU", engines.check_onnxruntime, ("export",)),
    Check("rtx_build", "TensorRT-RTX: build", engines.check_rtx_build, ("export", "tensorrt_rtx")),
    Check("rtx_run", "TensorRT-RTX: run", engines.check_rtx_run, ("rtx_build", "gpu")),
    Check(
        "rtx_stripped",
        "TensorRT-RTX: build without weights",
        engines.check_rtx_stripped,
        ("rtx_build", "gpu"),
    ),
    Check("rtx_refit", "TensorRT-RTX: refit", engines.check_rtx_refit, ("rtx_stripped",)),
    Check(
        "trtexec_build",
        "trtexec: build",
        engines.check_trtexec_build,
        ("export", "trtexec", "gpu", "driver"),
    ),
    Check(
        "trtexec_run", "trtexec: run", engines.run_check("trtexec"), ("trtexec_build", "tensorrt")
    ),
    *_wraps("trtexec", "trtexec"),
    Check(
        "python_build",
        "Python builder: build",
        engines.check_python_build,
        ("export", "tensorrt", "gpu", "driver"),
    ),
    Check("python_run", "Python builder: run", engines.run_check("python"), ("python_build",)),
    *_wraps("python", "Python builder"),
    Check(
        "stripped_build",
        "TensorRT: build without weights",
        engines.check_tensorrt_stripped,
        ("export", "tensorrt", "gpu", "driver"),
    ),
    Check("refit", "TensorRT: refit", engines.check_tensorrt_refit, ("stripped_build",)),
)
