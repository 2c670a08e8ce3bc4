"""A network as a tree of modules with shapes and parameter counts; equal neighbours stand in one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lavish.cli.terminal import human_count

if TYPE_CHECKING:
    from rich.tree import Tree
    from torch import nn


@dataclass
class Node:
    """A module: its name (a range for equal neighbours), class, parameters of all of them, and own tensors."""

    name: str
    kind: str
    num_parameters: int
    tensors: dict[str, list[int]]
    children: list[Node] = field(default_factory=list)
    count: int = 1

    @property
    def shape(self) -> tuple[Any, ...]:
        """What must be equal for two neighbours to be shown as one: everything but the name."""
        return (
            self.kind,
            tuple((name, *size) for name, size in self.tensors.items()),
            tuple((child.name, child.count, child.shape) for child in self.children),
        )

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain values for JSON."""
        return {
            "name": self.name,
            "class": self.kind,
            "count": self.count,
            "num_parameters": self.num_parameters,
            "tensors": self.tensors,
            "children": [child.as_dict() for child in self.children],
        }


def read_tree(module: nn.Module, name: str = "") -> Node:
    """Make the tree of a module; buffers that are saved are shown like parameters and not counted."""
    own = {key: list(value.shape) for key, value in module.named_parameters(recurse=False)}
    saved = module.state_dict(keep_vars=True)
    own |= {key: list(value.shape) for key, value in module.named_buffers(recurse=False) if key in saved}
    children: list[Node] = []
    for key, child in module.named_children():
        node = read_tree(child, key)
        last = children[-1] if children else None
        if last is not None and key.isdigit() and last.shape == node.shape:
            last.name = f"{last.name.partition('-')[0]}-{key}"
            last.count += 1
            last.num_parameters += node.num_parameters
        else:
            children.append(node)
    total = sum(parameter.numel() for parameter in module.parameters())
    return Node(name or type(module).__name__, type(module).__name__, total, own, children)


def draw_tree(root: Node) -> Tree:
    """Draw it for the terminal."""
    from rich.tree import Tree

    def add(tree: Tree, node: Node) -> None:
        for child in node.children:
            add(tree.add(_label(child)), child)

    tree = Tree(_label(root), guide_style="dim")
    add(tree, root)
    return tree


def _label(node: Node) -> Any:
    from rich.text import Text

    label = Text(node.name, style="bold" if node.children else "cyan")
    if node.kind != node.name:
        label.append(f"  {node.kind}", style="dim")
    if node.count > 1:
        label.append(f"  x {node.count}", style="yellow")
    for name, size in node.tensors.items():
        label.append(f"  {name} ", style="dim")
        label.append(" x ".join(map(str, size)) or "()")
    if node.num_parameters:
        label.append(f"  {human_count(node.num_parameters)}", style="green")
    return label
