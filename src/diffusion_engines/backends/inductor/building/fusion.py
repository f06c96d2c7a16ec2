"""Linear layers that take the same tensor become one, with their weights one below the other.

A denoiser projects the same hidden states to queries, keys and values, the same prompt to keys and
values in every block, and the same time embedding in every residual block: dozens of small matrix
products, each with a launch of its own, of which few fill a GPU. PyTorch's compiler does the like
where weights are constants; here they are inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

_LINEAR = torch.ops.aten.linear.default
# Computed anew by each layer that needs it, and equal each time.
_REPEATED = (torch.ops.aten.silu.default,)


def fuse_linears(program: Any) -> Mapping[str, Sequence[str]]:
    """Fuse the linear layers of an exported program that share their input, in place.

    Args:
        program: a ``torch.export.ExportedProgram``.

    Returns:
        for each weight or bias that the program takes instead of several, which those are, in the
        order in which they lie along the first dimension.
    """
    fused: dict[str, Sequence[str]] = {}
    for number, layers in enumerate(_groups(program)):
        fused |= _fuse(program, layers, f"fused_{number}")
    program.graph.eliminate_dead_code()
    _forget_unused(program)
    program.graph_module.recompile()
    program.validate()
    return fused


def _groups(program: Any) -> list[list[Any]]:
    """Return the linear layers that share an input and whose weights are the program's own."""
    weights = program.graph_signature.inputs_to_parameters
    groups: dict[object, list[Any]] = {}
    for node in program.graph.nodes:
        if node.target is not _LINEAR:
            continue
        source, *own = node.args
        if any(value is not None and value.name not in weights for value in own):
            continue
        again = source.target in _REPEATED
        key = (source.target, source.args) if again else source
        # A bias is there for all of a group or for none.
        groups.setdefault((key, len([value for value in own if value is not None])), []).append(
            node
        )
    return [layers for layers in groups.values() if len(layers) > 1]


def _fuse(program: Any, layers: Sequence[Any], name: str) -> Mapping[str, Sequence[str]]:
    graph, source = program.graph, layers[0].args[0]
    sides = [
        [layer.args[side] for layer in layers]
        for side in (1, 2)
        if len(layers[0].args) > side and layers[0].args[side] is not None
    ]
    words = ("weight", "bias")
    taken = {f"{name}.{word}": values for word, values in zip(words, sides, strict=False)}
    placeholders = [_placeholder(program, fqn, values) for fqn, values in taken.items()]
    own = [layer.meta["val"] for layer in layers]
    with graph.inserting_after(source if source.op != "placeholder" else _last_placeholder(graph)):
        whole = _call(graph, _LINEAR, (source, *placeholders), torch.cat(own, -1))
    rows = [value.shape[-1] for value in own]
    with graph.inserting_after(whole):
        parts = _call(graph, torch.ops.aten.split_with_sizes.default, (whole, rows, -1), own)
    after = parts
    for number, layer in enumerate(layers):
        with graph.inserting_after(after):
            after = _call(graph, operator.getitem, (parts, number), own[number])
        layer.replace_all_uses_with(after)
        graph.erase_node(layer)
    names = program.graph_signature.inputs_to_parameters
    return {fqn: [names[value.name] for value in values] for fqn, values in taken.items()}


def _call(graph: Any, target: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """Add a node whose result has the shape and dtype of ``value``, a fake tensor or several."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = value
    return node


def _placeholder(program: Any, fqn: str, values: Sequence[Any]) -> Any:
    """Add a parameter to a program: in its graph, its signature and its weights."""
    graph, specs = program.graph, program.graph_signature.input_specs
    names = program.graph_signature.inputs_to_parameters
    # A program's inputs are its parameters first; in the graph as in the signature.
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("p_" + fqn.replace(".", "_"))
    node.meta["val"] = torch.cat([value.meta["val"] for value in values])
    specs.insert(0, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), fqn))
    own = [program.state_dict[names[value.name]] for value in values]
    program.state_dict[fqn] = nn.Parameter(torch.cat(own), requires_grad=False)
    return node


def _last_placeholder(graph: Any) -> Any:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def _forget_unused(program: Any) -> None:
    signature = program.graph_signature
    parameters = signature.inputs_to_parameters
    for node in [node for node in program.graph.nodes if node.name in parameters]:
        if not node.users:
            fqn = parameters[node.name]
            program.graph.erase_node(node)
            signature.input_specs[:] = [
                spec for spec in signature.input_specs if spec.target != fqn
            ]
            program.state_dict.pop(fqn)
