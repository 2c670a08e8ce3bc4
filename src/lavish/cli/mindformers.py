"""The command line of MindFormers' `run_mindformer.py` for CogVLM2, taken by `lavish predict`.

    lavish predict --config predict_cogvlm2_image_llama3_chat_19b.yaml --load-checkpoint F.ckpt
                   --predict-data IMAGE "TEXT" --modal-type image text [--model-parallel 2] [--a.b.c VALUE] ...

It is translated into `lavish predict` with its own options before anything is parsed; what has no meaning here is said
on stderr. What the keys of the YAML mean stands in `models/cogvlm/mindformers.py`. torch is not imported.
Source: mindspore-lab/mindformers (v1.5.0), run_mindformer.py.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lavish.common.errors import ConfigError, did_you_mean, shown

if TYPE_CHECKING:
    from lavish.models.cogvlm.mindformers import Recipe

MARKS = ("--predict-data", "--load-checkpoint", "--modal-type")
"""Options that `lavish predict` itself does not have: one of them makes it MindFormers' command line."""
LISTS = ("predict-data", "modal-type", "options")
FLAGS = ("use-parallel", "auto-trans-ckpt", "do-sample", "resume-training", "only-save-strategy")
"""Options whose value may be left out: True then."""
OWN = ("config", "predict-data", "modal-type", "model-parallel", "options", "predict-batch-size")
KEYS = {
    "run-mode": "run_mode",
    "load-checkpoint": "load_checkpoint",
    "use-parallel": "use_parallel",
    "auto-trans-ckpt": "auto_trans_ckpt",
    "only-save-strategy": "only_save_strategy",
    "resume-training": "resume_training",
    "src-strategy-path-or-dir": "src_strategy_path_or_dir",
    "output-dir": "output_dir",
    "seed": "seed",
    "device-id": "context.device_id",
    "device-target": "context.device_target",
    "do-sample": "model.model_config.llm_model.model_config.do_sample",
}
"""MindFormers' other options -> the key of the YAML that they replace."""
PASSED = (
    "dtype",
    "device",
    "quantization",
    "tokenizer",
    "template",
    "max-new-tokens",
    "max-length",
    "temperature",
    "top-p",
    "top-k",
)
"""Options of `lavish predict` that are taken as they are."""
PATHS = ("load_checkpoint", "vocab_file", "output_dir", "strategy_path_or_dir")
"""Endings of keys whose values are texts, whatever they look like."""
MODALITIES = ("image", "video", "text")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclass
class Given:
    """What stands on the command line."""

    values: dict[str, list[str]] = field(default_factory=dict)
    """Options by name, with dashes."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Keys of the YAML -> text of their new value."""


def is_mindformers(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments of `lavish` are MindFormers'."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    return list(arguments[:1]) == ["predict"] and any(name in MARKS for name in names)


@contextmanager
def translated(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Give `lavish`'s own arguments for MindFormers', and others as they are; files that they name last as long as the
    block.

    Raises:
        ConfigError: an unknown option or key, a value that contradicts another one, or a file that is not there.
    """
    if not is_mindformers(arguments):
        yield list(arguments)
        return
    from lavish.cli.terminal import say
    from lavish.models.cogvlm.mindformers import read_recipe

    given = parse(arguments[1:])
    file = Path(os.path.expanduser(_one(given, "config") or ""))
    if "config" not in given.values:
        raise ConfigError(f"{arguments[1]} is of MindFormers' command line, which needs --config FILE.yaml too.")
    content = _read(file)
    for key, text in given.overrides.items():
        _replace(content, key, text if key.endswith(PATHS) else _value(text), file)
    recipe = read_recipe(content, str(file))
    with TemporaryDirectory(prefix="lavish-") as folder:
        fields = Path(folder) / "config.json"
        fields.write_text(json.dumps(recipe.fields), encoding="utf-8")
        notes: list[tuple[str, str]] = list(recipe.left_out)
        understood = ["predict", *_arguments(given, recipe, notes, str(file)), "--config", str(fields)]
        for warning in recipe.warnings:
            say(f"{file}: {warning}")
        _report(file, content, notes)
        yield understood


def parse(arguments: Sequence[str]) -> Given:
    """Sort the arguments into options and keys of the YAML.

    An option of several values takes all up to the next one; a value is cut off at the first `=` alone, so that it may
    hold others.

    Raises:
        ConfigError: an unknown option, no value, or a value without an option.
    """
    given = Given()
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"{shown(argument)} stands alone; MindFormers' command line has options only: --load-checkpoint FILE, "
                '--predict-data IMAGE "TEXT" --modal-type image text.'
            )
        name, equals, value = argument[2:].partition("=")
        values = [value] if equals else _values(name, left)
        if "." in name:
            if len(values) != 1:
                raise ConfigError(f"--{name} needs a value: --{name} VALUE.")
            given.overrides[name] = values[0]
            continue
        _add(given, name.replace("_", "-"), values)
    for option in given.values.pop("options", []):
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"--options {shown(option)}: write KEY=VALUE, such as seed=7.")
        given.overrides[key] = value
    return given


def _values(name: str, left: list[str]) -> list[str]:
    """Take the values of an option off the arguments."""
    most = len(left) if name.replace("_", "-") in LISTS else 1
    values: list[str] = []
    while left and len(values) < most and not left[0].startswith("--"):
        values.append(left.pop(0))
    return values


def _add(given: Given, name: str, values: list[str]) -> None:
    from lavish.models.cogvlm.mindformers import is_known

    key = KEYS.get(name) or (name.replace("-", "_") if is_known(name.replace("-", "_")) else None)
    if name not in (*OWN, *PASSED) and key is None:
        known = [*OWN, *KEYS, *PASSED]
        raise ConfigError(
            f"--{name} is no option of MindFormers' command line that lavish knows.{did_you_mean(name, known)} Keys of "
            "the YAML are written with all their parts: --model.model_config.llm_model.model_config.top_k 3."
        )
    if not values and name in FLAGS:
        values = ["True"]
    if not values:
        raise ConfigError(f"--{name} needs a value.")
    if name not in (*OWN, *PASSED) and key is not None:
        given.overrides[key] = values[0]
        return
    if name in given.values and name != "options":
        raise ConfigError(f"--{name} was given twice; give it once.")
    given.values.setdefault(name, []).extend(values)


def _one(given: Given, name: str) -> str | None:
    return given.values[name][0] if name in given.values else None


def _read(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:  # ValueError: bytes that are no text
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ConfigError(f"--config {file} is no YAML of MindFormers: it has no section 'model'.")
    return {str(name): value for name, value in content.items()}


def _value(text: str) -> Any:
    """Read a value as YAML does; what is no YAML is a text."""
    from yaml import YAMLError, safe_load

    try:
        return safe_load(text)
    except YAMLError:
        return text


def _replace(content: dict[str, Any], key: str, value: Any, file: Path) -> None:
    """Replace a key of the YAML, or add one that lavish knows."""
    from lavish.models.cogvlm.mindformers import flattened, is_known, known_keys

    named = [name for name, _ in flattened(content)]
    if key not in named and not is_known(key):
        raise ConfigError(
            f"--{key}: neither {file} nor lavish has such a key.{did_you_mean(key, [*named, *known_keys()])}"
        )
    *outer, last = key.split(".")
    place: Any = content
    for part in outer:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: {part!r} of {file} is {shown(inner)} and no section.")
        place = inner
    place[last] = value


# -- what lavish predict is told ---------------------------------------------------------------------------------------


def _arguments(given: Given, recipe: Recipe, notes: list[tuple[str, str]], where: str) -> list[str]:
    """Give the arguments of `lavish predict`; what is not used joins the notes."""
    if recipe.checkpoint is None:
        raise ConfigError(f"{where} has no load_checkpoint; give --load-checkpoint FILE.")
    if "predict-batch-size" in given.values:
        notes.append(("--predict-batch-size", "one question is one row"))
    options = {name: values[0] for name, values in given.values.items() if name in PASSED}
    options |= {name: value for name, value in _answering(recipe, options, notes, where).items() if name not in options}
    if "tokenizer" not in options and (tokenizer := _tokenizer(recipe, notes, where)) is not None:
        options["tokenizer"] = tokenizer
    ranks = _one(given, "model-parallel")
    if ranks is not None and (not ranks.isdecimal() or int(ranks) < 1):
        raise ConfigError(f"--model-parallel {shown(ranks)}: it is a whole number from 1.")
    size = int(ranks) if ranks is not None else recipe.model_parallel
    if ranks is not None:
        notes[:] = [note for note in notes if note[0] != "parallel_config.model_parallel"]
    if size > 1:
        options["tensor-parallel"] = str(size)
    arguments = [os.path.expanduser(recipe.checkpoint), *_question(given, recipe)]
    return [*arguments, *(part for name, value in options.items() for part in (f"--{name}", value))]


def _question(given: Given, recipe: Recipe) -> list[str]:
    """Give what is asked: a text, and a picture or a video."""
    data, kinds = given.values.get("predict-data", []), given.values.get("modal-type", [])
    if len(data) != len(kinds):
        raise ConfigError(
            f"--predict-data has {len(data)} values and --modal-type {len(kinds)}; give one kind for each: "
            '--predict-data IMAGE "TEXT" --modal-type image text.'
        )
    found: dict[str, str] = {}
    for value, kind in zip(data, kinds, strict=True):
        if kind not in MODALITIES:
            raise ConfigError(
                f"--modal-type {shown(kind)}; it is {', '.join(MODALITIES)}.{did_you_mean(kind, MODALITIES)}"
            )
        if kind in found:
            raise ConfigError(f"--predict-data holds two of the kind {kind!r}; give one.")
        found[kind] = value
    if "text" not in found:
        raise ConfigError("--predict-data holds no text; a question is asked: --modal-type image text.")
    if "image" in found and "video" in found:
        raise ConfigError("--predict-data holds an image and a video; give one of them.")
    if "video" in found and not recipe.is_video:
        raise ConfigError("--modal-type video, and the YAML is of the image model (CogVLM2ImageForCausalLM).")
    if found.get("image", "").lower().endswith(VIDEO_SUFFIXES):
        raise ConfigError(f"--predict-data {shown(found['image'])} is a video; its --modal-type is 'video'.")
    return [part for kind in ("image", "video", "text") if kind in found for part in (_option(kind), found[kind])]


def _option(kind: str) -> str:
    return "--question" if kind == "text" else f"--{kind}"


def _answering(recipe: Recipe, options: Mapping[str, str], notes: list[tuple[str, str]], where: str) -> dict[str, str]:
    """Give how the YAML wants to be answered."""
    wanted = dict(recipe.generation)
    is_drawn = wanted.pop("do_sample", False)
    if not isinstance(is_drawn, bool):
        raise ConfigError(f"{where}: do_sample is {shown(is_drawn)}; it is True or False.")
    penalty = wanted.pop("repetition_penalty", 1)
    if penalty != 1:
        raise ConfigError(
            f"{where}: repetition_penalty is {shown(penalty)}, which lavish predict has no option for; in Python it is "
            "vlm.chat(messages, repetition_penalty=...). Set it to 1 here."
        )
    if not is_drawn:
        unused = [name for name in _SAMPLING if wanted.pop(name, None) is not None]
        notes += [(name, "nothing is drawn (do_sample is False)") for name in unused]
    elif "temperature" not in options:
        wanted.setdefault("temperature", 1.0)
    is_said = "max-new-tokens" in options or "max_new_tokens" in wanted
    if is_said and wanted.pop("max_length", None) is not None:
        notes.append(("max_decode_length", "max_new_tokens says how long the answer may be"))
    return {name.replace("_", "-"): str(value) for name, value in wanted.items()}


def _tokenizer(recipe: Recipe, notes: list[tuple[str, str]], where: str) -> str | None:
    """Give the folder of the tokenizer: the YAML's, or None for that beside the checkpoint."""
    if recipe.tokenizer is not None:
        file = Path(os.path.expanduser(recipe.tokenizer))
        if file.exists():
            return str(file if file.is_dir() else file.parent)
    checkpoint = Path(os.path.expanduser(recipe.checkpoint or ""))
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        if recipe.tokenizer is not None:
            notes.append(("tokenizer.vocab_file", f"no such file; the tokenizer in {folder} is taken"))
        return None
    named = (
        f"vocab_file is {recipe.tokenizer}, and no such file is there" if recipe.tokenizer else "names no vocab_file"
    )
    raise ConfigError(f"{where}: {named}. Set processor.tokenizer.vocab_file, or give --tokenizer FOLDER.")


def _report(file: Path, content: Mapping[str, Any], notes: list[tuple[str, str]]) -> None:
    """Say what of the YAML has no meaning here, by reason."""
    from lavish.cli.terminal import say
    from lavish.models.cogvlm.mindformers import flattened

    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in notes:
        by_reason[reason].append(key)
    total = sum(1 for _ in flattened(content))
    say(f"{file}: {total - len(notes)} of {total} settings are used; without a meaning here:", style="dim")
    for reason, keys in by_reason.items():
        say(f"  {', '.join(keys)}: {reason}", style="dim")
