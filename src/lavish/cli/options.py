"""Arguments and options that several commands take: one name, one help text, one place."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lavish.common.errors import ConfigError

ANSWER, LOADING = "Answer", "Load"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder, hub id (org/name), or a name of [bold]lavish zoo[/bold]; without it the bundled model.",
    ),
]
Video = Annotated[
    str | None, typer.Option("--video", metavar="FILE", help="One video, for models that see one; needs PyAV.")
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        "--version",
        metavar="NAME",
        rich_help_panel=ANSWER,
        help="Prompt format, of CogVLM: chat, vqa or base; default: the model's.",
    ),
]
Grounding = Annotated[
    bool | None,
    typer.Option(
        "--grounding/--no-grounding",
        rich_help_panel=ANSWER,
        help="Read the boxes of answers, chat draws them; default: for grounding models.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", rich_help_panel=ANSWER, help="Most tokens of an answer; default 2048."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=ANSWER, help="Most tokens of image, conversation and answer together."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, metavar="N", rich_help_panel=ANSWER, help="Above 0 draws; default: the likeliest words."),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", rich_help_panel=ANSWER, help="Draw among the likeliest words up to this probability."),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", rich_help_panel=ANSWER, help="Draw among this many words; 1 is no draw."),
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", rich_help_panel=ANSWER, help="Same seed, same draw.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        show_default=False,
        rich_help_panel=LOADING,
        help="auto, bfloat16, float16 or float32; auto is as stored.",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", show_default=False, rich_help_panel=LOADING, help="auto, cpu, cuda, cuda:1 or mps."),
]
Quantization = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=LOADING, help="int8, or nf4 with bitsandbytes: less memory."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        "--local-tokenizer",
        metavar="PATH",
        rich_help_panel=LOADING,
        help="Folder or hub id, where the model's folder has none (CogVLM v1: a Vicuna-7B).",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="PATH", rich_help_panel=LOADING, help="Folder of a LoRA to put on the model."),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="PATH", rich_help_panel=LOADING, help="The base, where MODEL is itself a LoRA's folder."
    ),
]
Pieces = Annotated[
    list[str] | None,
    typer.Option(
        "--piece",
        metavar="NAME=PATH",
        rich_help_panel=LOADING,
        help="A part of the release that is elsewhere: llm=, vision_tower=, eva=, blip2=, qformer=; may be repeated.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", rich_help_panel=LOADING, help="JSON or YAML with fields that the files do not say."
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        min=1,
        metavar="N",
        rich_help_panel=LOADING,
        help="Share the model among N processes, one a GPU or on the CPU, and start them; torchrun starts them too.",
    ),
]

Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", show_default=False, help="The YAML file of the run.")]
CfgPath = Annotated[
    str | None, typer.Option("--cfg-path", metavar="RECIPE", help="The YAML file, as LAVIS's scripts take it.")
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE",
        help="A module of your own, by name or .py file, that registers models, data sets or tasks; may be repeated.",
    ),
]


def _go_offline(wanted: bool) -> bool:
    """Forbid the network, to the hub's client too, which reads its variable when it is imported."""
    if wanted:
        os.environ.update(LAVISH_OFFLINE="1", HF_HUB_OFFLINE="1")
    return wanted


Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_go_offline,
        help="Fetch nothing; say where to put what is absent (so does LAVISH_OFFLINE=1).",
    ),
]
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", show_default=False, help="More of what --set takes."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "--options",
        metavar="KEY=VALUE",
        help="Replace a key of the recipe, e.g. run.seed=7; may be repeated.",
    ),
]


def recipe_of(
    recipe: str | None, cfg_path: str | None, overrides: list[str] | None, more: list[str] | None
) -> tuple[str, list[str]]:
    """Give the recipe's path and the overrides: `RECIPE --set a.b=c`, or as LAVIS's scripts take them,
    `--cfg-path RECIPE --options a.b=c d.e=f`.

    Raises:
        ConfigError: no recipe, or two.
    """
    if cfg_path is None:
        if recipe is None:
            raise ConfigError("No recipe was given: name its YAML file, as RECIPE or with --cfg-path RECIPE.")
        return recipe, [*(overrides or ()), *(more or ())]
    if recipe is not None and "=" not in recipe and not overrides:
        raise ConfigError(f"Two recipes were given, {recipe!r} and --cfg-path {cfg_path!r}; leave one out.")
    # The words after the first of --options arrive as arguments.
    return cfg_path, [*(overrides or ()), *([] if recipe is None else [recipe]), *(more or ())]
