"""The network that goes the whole way: small, with what the article's UNet is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines import manifests
from diffusion_engines.errors import GateError
from diffusion_engines.families.base import Dim, OutputSpec, TensorSpec
from diffusion_engines.files import MANIFEST, copy_files

if TYPE_CHECKING:
    import torch
    from torch import nn

COMPONENT, PRECISION, OPSET = "unet", "fp16", 18
# Two sizes, in turn: what remembers the last one shows.
BATCHES = (1, 3, 1, 3)
INPUTS = (
    TensorSpec("input_0", "latents", "component", (Dim("batch", 2, 1, 4), 4, 16, 16)),
    TensorSpec("input_1", "timestep", "float32", (1,)),
)
# Of fp16 to fp32; the gate of the UNet in conf/validate/ is of this size.
TOLERANCE = 1e-2
# Of two fine-tunes, by the number of each; and the structure that they share.
GRAPHS = ("graph", "graph-tuned")
STRUCTURE = "structure"


def network(tune: int = 0) -> nn.Module:
    """Return the network, always with the same weights of one of its fine-tunes.

    It takes latents (batch, 4, 16, 16) and a timestep (1,), and returns (batch, 4, 16, 16).
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Toy(nn.Module):
        """A convolution, a norm, attention over the pixels, and a convolution back."""

        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Conv2d(4, 32, 3, padding=1)
            self.norm = nn.GroupNorm(8, 32)
            self.attention = nn.Linear(32, 96)
            self.out = nn.Conv2d(32, 4, 3, padding=1)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            latents, timestep = inputs
            hidden = self.into(latents) + torch.sin(timestep).to(latents.dtype)
            hidden = functional.silu(self.norm(hidden))
            pixels = hidden.flatten(2).transpose(1, 2)
            heads = self.attention(pixels).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*heads.unbind(0))
            mixed = mixed.transpose(1, 2).flatten(2).transpose(1, 2).reshape(hidden.shape)
            image: torch.Tensor = self.out(hidden + mixed)
            return image

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tune)
        return Toy().eval()


def export(folder: Path) -> manifests.Graph:
    """Write the graphs of both fine-tunes and their structure; return the first one's manifest."""
    first, _ = (_export(folder / name, tune) for tune, name in enumerate(GRAPHS))
    from diffusion_engines.onnx.graph import DATA

    structure = folder / STRUCTURE
    structure.mkdir(exist_ok=True)
    copy_files(folder / GRAPHS[0], structure, skip=(MANIFEST, DATA))
    manifests.write(structure, manifests.structure_of_graph(first))
    return first


def _export(graph: Path, tune: int) -> manifests.Graph:
    import onnx
    import torch

    from diffusion_engines.onnx.export import export_module
    from diffusion_engines.onnx.graph import MODEL
    from diffusion_engines.onnx.structure import save_with_weights_apart

    graph.mkdir(exist_ok=True)
    export_module(
        network(tune).half(),
        INPUTS,
        graph,
        precision=PRECISION,
        exporter="dynamo",
        opset=OPSET,
        patches=[],
    )
    save_with_weights_apart(onnx.load(graph / MODEL), graph / MODEL)
    weights = manifests.Weights("toy", "synthetic", None, None, synthetic=True, seed=tune)
    made = manifests.graph_from_weights(
        weights,
        name=f"{COMPONENT}-{PRECISION}",
        component=COMPONENT,
        precision=PRECISION,
        inputs=INPUTS,
        outputs=(OutputSpec("output_0", "noise"),),
        guidance=False,
        exporter="dynamo",
        opset=OPSET,
        patches=(),
        versions={"torch": torch.__version__},
    )
    manifests.write(graph, made)
    return made


def compare_fine_tunes(
    module: Callable[..., Any], give: Callable[[int], None], device: str
) -> dict[str, float]:
    """Give a module the weights of each fine-tune and then of the first again.

    Args:
        module: as the network.
        give: puts the weights of a fine-tune into the module, by its number.
        device: of the module.

    Returns:
        For each turn, the largest relative L2 distance to the fine-tune in fp32.

    Raises:
        GateError: it is above :data:`TOLERANCE`, or the first one's numbers are others after the
            second.
    """
    import torch

    latents = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16).half().to(device)
    timestep = torch.full((1,), 500.0).to(device)
    worst, outputs = {}, []
    for turn, tune in (("first", 0), ("second", 1), ("first_again", 0)):
        give(tune)
        worst[turn] = compare(module, device, tune)
        outputs.append(module(latents, timestep).float().cpu())
    if not torch.equal(outputs[0], outputs[2]):
        differing = int((outputs[0] != outputs[2]).sum())
        raise GateError(
            "after the weights of another fine-tune, those of the first give other numbers",
            expected="the same, bit for bit",
            found=f"{differing} of {outputs[0].numel()} differ",
            fix="send the page and the JSON back",
        )
    return worst


def compare(module: Callable[..., Any], device: str, tune: int = 0) -> float:
    """Call a module with two sizes in turn; return the largest relative L2 distance to fp32.

    Args:
        module: as the network.
        device: of the module.
        tune: the fine-tune whose weights it should have.

    Raises:
        GateError: it is above :data:`TOLERANCE`.
    """
    import torch

    from diffusion_engines.parity.metrics import difference

    reference, worst = network(tune), 0.0
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        latents = torch.randn(batch, 4, 16, 16, generator=generator).half()
        timestep = torch.rand(1, generator=generator) * 999
        with torch.no_grad():
            expected = reference(latents.float(), timestep)
            output = module(latents.to(device), timestep.to(device))
        image = output[0] if isinstance(output, (list, tuple)) else output
        found = difference(image.float().cpu(), expected).rel_l2
        if not found <= TOLERANCE:
            raise GateError(
                f"the toy network is not what PyTorch computes, at batch {batch}",
                expected=f"a relative L2 distance of at most {TOLERANCE}",
                found=f"{found:.2e}",
                fix="send the page and the JSON back",
            )
        worst = max(worst, found)
    return worst
