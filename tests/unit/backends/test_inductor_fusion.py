"""Linear layers that share an input, fused: the same results from fewer layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_engines.backends.inductor.building.fusion import fuse_linears

_LINEAR = torch.ops.aten.linear.default


class Block(nn.Module):
    """Attention's projections, a time embedding's, and what must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))
        self.scale, self.shift = nn.Linear(6, 8), nn.Linear(6, 8)
        self.alone = nn.Linear(8, 8)
        self.biased = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scores = self.query(hidden)[:, :, :4] * self.key(hidden) + self.value(hidden)
        # Each computes the activation anew, as a UNet's residual blocks do.
        scale, shift = (
            layer(nn.functional.silu(embedding))[:, None] for layer in (self.scale, self.shift)
        )
        return self.alone(self.biased(hidden) * scale + shift) + torch.cat([scores, scores], -1)


def exported(module: nn.Module, *inputs: torch.Tensor) -> Any:
    return torch.export.export(module.eval(), inputs, strict=False)


def linears(program: Any) -> int:
    return sum(node.target is _LINEAR for node in program.graph.nodes)


def test_layers_that_share_an_input_become_one() -> None:
    torch.manual_seed(0)
    module, inputs = Block(), (torch.randn(2, 5, 8), torch.randn(2, 6))
    program = exported(module, *inputs)
    fused = fuse_linears(program)
    assert fused == {
        "fused_0.weight": ["query.weight", "key.weight", "value.weight"],
        "fused_1.weight": ["scale.weight", "shift.weight"],
        "fused_1.bias": ["scale.bias", "shift.bias"],
    }
    assert linears(program) == 4  # query, key and value; scale and shift; biased; alone
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_a_fused_programs_weights_are_inputs_by_name() -> None:
    module = Block()
    program = exported(module, torch.randn(2, 5, 8), torch.randn(2, 6))
    fused = fuse_linears(program)
    own = module.state_dict()
    for name, parts in fused.items():
        assert torch.equal(program.state_dict[name], torch.cat([own[part] for part in parts]))
    gone = {part for parts in fused.values() for part in parts}
    assert set(program.state_dict) == (set(own) - gone) | set(fused)


def test_layers_with_and_without_bias_stay_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) * self.other(x)

    program = exported(Two(), torch.randn(3, 4))
    assert fuse_linears(program) == {}
    assert linears(program) == 2


def test_a_weight_that_others_use_too_is_kept() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.other(x) + self.one.weight.sum()

    torch.manual_seed(0)
    module, x = Tied(), torch.randn(3, 4)
    program = exported(module, x)
    assert set(fuse_linears(program)) == {"fused_0.weight"}
    assert set(program.state_dict) == {"fused_0.weight", "one.weight"}
    torch.testing.assert_close(program.module()(x), module(x))


def test_open_dimensions_stay_open() -> None:
    module = Block()
    rows = torch.export.Dim("rows", min=1, max=8)
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 6))
    program = torch.export.export(
        module.eval(), inputs, dynamic_shapes=({0: rows}, {0: rows}), strict=False
    )
    assert len(fuse_linears(program)) == 3
    for count in (1, 3, 8):
        more = (torch.randn(count, 5, 8), torch.randn(count, 6))
        torch.testing.assert_close(program.module()(*more), module(*more))
