"""What the backends touch of TensorRT's Python API is there, in the real bindings of each release.

No TensorRT is here: its bindings are, as wheels, and import over stub libraries
(tests/doubles/bindings.py). What the code touches is read from its source (tests/touched.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args, get_type_hints

import platformdirs
import pytest
from filelock import FileLock

from diffusion_engines.backends.nvidia import building as shared
from diffusion_engines.backends.tensorrt.building import python
from diffusion_engines.backends.tensorrt.settings import TensorRTBuild
from diffusion_engines.backends.tensorrt_rtx import building as rtx
from diffusion_engines.backends.tensorrt_rtx.settings import RTX_CAPABILITIES, TensorRTRTXBuild
from tests.conftest import ROOT
from tests.doubles.bindings import Api, UnavailableError, api_of_installed, api_of_release
from tests.touched import touched_by

# The last of TensorRT 10, the first of 11, which dropped weak typing, and the current one.
RELEASES = ("10.16.1.11", "11.0.0.114", "11.4.0.106")
BACKENDS = ROOT / "src" / "diffusion_engines" / "backends"


def chosen(settings: type, key: str) -> list[str]:
    """The values of a builder setting that name members of an enum."""
    return list(get_args(get_type_hints(settings)[key]))


VERBOSITIES = {name.upper() for name in chosen(TensorRTBuild, "profiling_verbosity")}
# The members that settings choose, by the class that they are of; "": dtypes of bindings.
CHOSEN = {
    "": {"bfloat16", "int64"},
    "ProfilingVerbosity": VERBOSITIES,
    "HardwareCompatibilityLevel": set(python._HARDWARE.values()),
    "TilingOptimizationLevel": set(rtx._TILING.values()),
}


def check(api: Api, *packages: str) -> set[tuple[str, str]]:
    """Check every module of some backends; return what they touch."""
    members: set[tuple[str, str]] = set()
    problems = []
    for path in sorted(path for package in packages for path in (BACKENDS / package).rglob("*.py")):
        found = touched_by(path.read_text(), api)
        members |= found.members
        problems += [f"{path.relative_to(ROOT)} {problem}" for problem in found.problems]
        for of in found.chosen:
            missing = CHOSEN[of] - set(api[of])
            problems += [f"{path.relative_to(ROOT)} {of}.{name}" for name in sorted(missing)]
    assert not problems, "\n".join(problems)
    return members


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_of_tensorrt_has_what_the_backend_touches(release: str) -> None:
    tag = f"{release}-{importlib.util.MAGIC_NUMBER.hex()}"  # wheels are for one Python
    folder = Path(platformdirs.user_cache_dir("diffusion-engines")) / "bindings" / tag
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        try:
            api = api_of_release(release, folder)
        except UnavailableError as error:
            pytest.skip(f"the bindings of TensorRT {release} cannot be had here: {error}")
    members = check(api, "nvidia", "tensorrt")
    # A reader of source that sees nothing would pass everything.
    assert members >= {
        ("Builder", "build_serialized_network_to_stream"),
        ("IBuilderConfig", "set_timing_cache"),
        ("IExecutionContext", "execute_async_v3"),
        ("IProgressMonitor", "step_complete"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("BuilderFlag", "REFIT"),
        ("BuilderFlag", "STRIP_PLAN"),
        ("Refitter", "get_all_weights"),
        ("Refitter", "get_missing_weights"),
        ("ITimingCache", "serialize"),
    }
    # The members that a network's dtypes are counted by.
    assert set(shared._PRECISION_OF_DTYPE) <= set(api["DataType"])


@pytest.fixture(scope="module")
def rtx_api() -> Api:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    return api_of_installed("tensorrt_rtx")


def test_tensorrt_rtx_has_what_the_backend_touches(rtx_api: Api) -> None:
    members = check(rtx_api, "nvidia", "tensorrt_rtx")
    assert ("IBuilderConfig", "set_compute_capability") in members
    assert set(chosen(TensorRTRTXBuild, "tiling_optimization_level")) == set(rtx._TILING)
    names = {f"SM{capability.replace('.', '')}" for capability in RTX_CAPABILITIES}
    assert names <= set(rtx_api["ComputeCapability"])


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("trt.Bilder(logger)", "Bilder"),
        ("trt.BuilderFlag.FP99", "BuilderFlag.FP99"),
        ("config.fast = True", "IBuilderConfig.fast"),
        ("builder.create_builder_config().fast()", "IBuilderConfig.fast"),
        ("config.set_timing_cache(None, ignore=True)", "IBuilderConfig.set_timing_cache(ignore=…)"),
        ("for i in range(2):\n  network.get_layer(i).get_output(0).kind", "ITensor.kind"),
        (
            "[e.nodes() for e in [trt.OnnxParser(network, logger).get_error(0)]]",
            "ParserError.nodes",
        ),
        ("def f(engine: Any):\n  return lambda: [engine.run() for _ in 'ab']", "ICudaEngine.run"),
        ("class W(trt.IStreamWriter):\n  def put(self, data: bytes): ...", "IStreamWriter.put"),
        ("def f(thing: Any):\n  thing.run()", "?thing.run"),
    ],
)
def test_a_use_of_what_is_not_there_is_seen(rtx_api: Api, code: str, problem: str) -> None:
    body = "\n".join(f"  {line}" for line in code.splitlines())
    parameters = "trt: Any, builder: Any, config: Any, network: Any, logger: Any"
    (found,) = touched_by(f"def f({parameters}):\n{body}\n", rtx_api).problems
    assert problem in found
