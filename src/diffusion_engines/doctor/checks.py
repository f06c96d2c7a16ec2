"""All checks, in order, and what each builds on."""

from __future__ import annotations

from diffusion_engines.doctor import engines, machine
from diffusion_engines.doctor.findings import Check

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
        "trtexec_build",
        "trtexec: build",
        engines.check_trtexec_build,
        ("export", "trtexec", "gpu", "driver"),
    ),
    Check(
        "trtexec_run", "trtexec: run", engines.run_check("trtexec"), ("trtexec_build", "tensorrt")
    ),
    Check(
        "trtexec_wrap",
        "trtexec: TorchScript",
        engines.wrap_check("trtexec"),
        ("trtexec_build", "tensorrt", "torch_tensorrt"),
    ),
    Check(
        "trtexec_torchscript",
        "trtexec: run TorchScript",
        engines.torchscript_check("trtexec"),
        ("trtexec_wrap",),
    ),
    Check(
        "python_build",
        "Python builder: build",
        engines.check_python_build,
        ("export", "tensorrt", "gpu", "driver"),
    ),
    Check("python_run", "Python builder: run", engines.run_check("python"), ("python_build",)),
    Check(
        "python_wrap",
        "Python builder: TorchScript",
        engines.wrap_check("python"),
        ("python_build", "torch_tensorrt"),
    ),
    Check(
        "python_torchscript",
        "Python builder: run TorchScript",
        engines.torchscript_check("python"),
        ("python_wrap",),
    ),
)
