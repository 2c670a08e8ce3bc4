"""Rules from the tensors of a LAVIS run (`checkpoint_best.pth`) to our modules, and the start from a plain GPT-2.

The names are the same; what is here is what older transformers saved beside them.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from lavish.checkpoints.rules import Drop, Rule
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch
from lavish.models.gpt_dialogue.model import GPTDialogueLMHeadModel
from lavish.processors.gpt_processors import SPECIAL_TOKENS

RULES: tuple[Rule, ...] = (
    # Trap: written as "everything that ends in attn.bias" they would take attn.c_attn.bias too.
    Drop("transformer.h.*.attn.bias", why="the causal mask, a buffer of transformers before 4.27"),
    Drop("transformer.h.*.attn.masked_bias", why="the number under that mask"),
)


def complete(network: GPTDialogueLMHeadModel, absent: Iterable[str] = ()) -> None:
    """Check that no tensor is left to compute: this network has none that a file may leave out.

    Raises:
        CheckpointError: `absent` names one.
    """
    for name in absent:
        raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")


def stored_sizes(tensors: TensorMap) -> dict[str, int]:
    """Read the sizes that a file's shapes tell: all but the number of heads. What a damaged file lacks is left out."""
    places = {
        "vocab_size": ("transformer.wte.weight", 0),
        "n_embd": ("transformer.wte.weight", 1),
        "n_positions": ("transformer.wpe.weight", 0),
        "n_inner": ("transformer.h.0.mlp.c_fc.weight", 1),
        "len_video_ft": ("video_ff.weight", 1),
    }
    shapes = {name: tensors.info(name).shape for name, _ in places.values() if name in tensors}
    sizes = {size: shapes[name][dim] for size, (name, dim) in places.items() if len(shapes.get(name, ())) == 2}
    layers = [int(found[1]) for name in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", name))]
    return sizes | ({"n_layer": max(layers) + 1} if layers else {})


@torch.no_grad()
def start_from_gpt2(network: GPTDialogueLMHeadModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the weights of a released GPT-2 into a fresh network, as a LAVIS run starts.

    The rows of the special tokens and the two video layers keep their fresh values. Names with and without
    `transformer.` are taken.

    Raises:
        MissingKeys: a tensor of GPT-2 is absent.
        ShapeMismatch: one has another shape than the config says.
    """
    given = {name.removeprefix("transformer."): name for name in tensors}
    table = network.transformer.wte.weight
    for name, parameter in network.transformer.named_parameters():
        if name not in given:
            raise MissingKeys(
                f"{name!r} of GPT-2 is absent ({len(given)} tensors were given); give the weights of a whole GPT-2."
            )
        value = tensors[given[name]]
        target = table[: table.shape[0] - len(SPECIAL_TOKENS)] if parameter is table else parameter
        if value.shape != target.shape:
            raise ShapeMismatch(
                f"{given[name]!r} is {tuple(value.shape)} and this config makes it {tuple(target.shape)}. Take the "
                "sizes from the config.json beside the weights."
            )
        target.copy_(value)
