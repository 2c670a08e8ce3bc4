"""From what stands on the command line to a loaded model: names of the zoo, options of the released demos.

torch is imported by `load_model` and not before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavish.checkpoints import hub
from lavish.cli.terminal import human_bytes, human_seconds, say, working
from lavish.common import dist
from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.models import ZooEntry, model_zoo

if TYPE_CHECKING:
    from lavish.inference.vlm import VLM

POCKET_NAMES = ("pocket", "lavish-pocket")
"""How the bundled model can be asked for; no name at all is it too."""
UNSUPPORTED_NAMES = ("cogagent",)
QUANTIZATION_OF_BITS = {8: "int8", 4: "nf4"}


def resolve_model(name: str | None) -> tuple[str | None, ZooEntry | None]:
    """Give what `lavish.load` takes (None: the bundled model), and the row of the zoo if the name is in it.

    A path that exists is that path, whatever the zoo says.

    Raises:
        ConfigError: a bare name that is neither a path nor in the zoo; the nearest is suggested.
    """
    if name is None:
        return None, None
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return path, None
    entry = model_zoo.get(name.partition("@")[0])
    if entry is not None:
        return (entry.hub_id if name == entry.name else name) if entry.hub_id else None, entry
    if name in POCKET_NAMES:
        return None, None
    if name.startswith(UNSUPPORTED_NAMES):
        raise ConfigError(f"{name!r}: lavish does not know CogAgent. `lavish zoo` lists the models that it knows.")
    if "/" not in name:
        raise ConfigError(
            f"{shown(name)}: no such folder here, and no model of this name.{did_you_mean(name, model_zoo)} "
            "`lavish zoo` lists the names; a hub id is written org/name."
        )
    return name, None


def choose_dtype(dtype: str, *, fp16: bool, bf16: bool) -> str:
    """Join --dtype with the released demos' --fp16 and --bf16.

    Raises:
        ConfigError: they contradict each other.
    """
    named = [name for name, is_given in (("float16", fp16), ("bfloat16", bf16)) if is_given]
    same = {"fp16": "float16", "bf16": "bfloat16"}.get(dtype, dtype)
    if len(named) > 1 or (named and dtype != "auto" and same != named[0]):
        given = [*(["--fp16"] if fp16 else []), *(["--bf16"] if bf16 else [])]
        given += [f"--dtype {dtype}"] if dtype != "auto" else []
        raise ConfigError(f"{' and '.join(given)} contradict each other; give one of them.")
    return named[0] if named else dtype


def choose_quantization(quantization: str | None, bits: int | None) -> str | None:
    """Join --quantization with the released demos' --quant 8|4.

    Raises:
        ConfigError: another number of bits, or two answers.
    """
    if bits is None:
        return quantization
    if bits not in QUANTIZATION_OF_BITS:
        raise ConfigError(f"--quant {bits} is not offered; it is 8 (int8) or 4 (nf4, needs bitsandbytes).")
    if quantization not in (None, QUANTIZATION_OF_BITS[bits]):
        raise ConfigError(f"--quant {bits} and --quantization {quantization} contradict each other; give one of them.")
    return QUANTIZATION_OF_BITS[bits]


def read_pieces(pieces: Sequence[str] | None) -> dict[str, str]:
    """Read `--piece NAME=PATH`.

    Raises:
        ConfigError: no such form, or a piece that is given twice.
    """
    found: dict[str, str] = {}
    for piece in pieces or ():
        name, equals, path = piece.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--piece {shown(piece)}: write NAME=PATH, such as --piece llm=Qwen-7B-Chat.")
        if name in found:
            raise ConfigError(f"--piece {name}= was given twice: {found[name]} and {path}. Give it once.")
        found[name] = path
    return found


def load_model(
    model: str | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    pieces: Sequence[str] | None = None,
    config: str | None = None,
    words: tuple[str, str] = ("Loading {name}", "{name} loaded in {time}"),
) -> VLM:
    """Load a model by path, hub id, zoo name, or the bundled one, and say so on stderr.

    A CogVLM v1 release keeps its tokenizer apart: it is fetched from where the zoo says, unless one is named. Among
    several processes of torchrun each loads its share.

    Raises: as `lavish.load`.
    """
    import time

    path, entry = resolve_model(model)
    if tokenizer is None and entry is not None:
        tokenizer = entry.tokenizer
    elif tokenizer is not None:
        tokenizer = os.path.expanduser(tokenizer)
    given = read_pieces(pieces)
    others = {
        name: value if value is None else os.path.expanduser(value)
        for name, value in {"adapter": adapter, "base": base, "config": config, **given}.items()
    }
    for wanted in (path, tokenizer):
        if wanted is not None and not os.path.exists(wanted):
            hub.resolve(wanted)  # downloads with bars of its own, which a spinner would tear
    name = model or "pocket"
    started_s = time.monotonic()
    with working(words[0].format(name=name)):
        from lavish.inference.load import load

        vlm = load(
            path,
            dtype=dtype,
            device=device,
            quantization=quantization,
            tokenizer=tokenizer,
            pack="auto",
            parallel="tensor" if dist.world_size() > 1 else None,
            **others,  # pyright: ignore[reportArgumentType]
        )
    say(words[1].format(name=name, time=human_seconds(time.monotonic() - started_s)), style="dim")
    return vlm


def describe(vlm: VLM) -> str:
    """Say in a few words what was loaded: size in memory, dtype, device."""
    from lavish.inference.packing import weight_bytes

    kind = str(next(vlm.model.parameters()).dtype).removeprefix("torch.")
    return f"{human_bytes(weight_bytes(vlm.model))} · {kind} · {vlm.device}"
