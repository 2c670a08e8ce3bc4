"""`lavish chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lavish.cli.terminal import say
from lavish.cli.wording import LANGUAGES, WORDINGS, choose_language
from lavish.common.errors import ConfigError, did_you_mean

SAMPLING = "Answer"
LOADING = "Load"
RELEASED = "Names of the released demos"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder, hub id (org/name), or a name of [bold]lavish zoo[/bold]; without it the bundled model.",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", "-i", metavar="FILE", help="Image, path or URL; without it you are asked.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template", "--version", metavar="NAME", help="Prompt format: chat, vqa or base; default: the model's."
        ),
    ] = None,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Ask the empty question about each new image (captions of base models).")
    ] = False,
    language: Annotated[
        str | None, typer.Option("--lang", metavar="en|zh", help="Language of the prompts; default: the locale's.")
    ] = None,
    grounding: Annotated[
        bool | None,
        typer.Option("--grounding/--no-grounding", help="Draw the boxes of answers; default: for grounding models."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=SAMPLING, help="Most tokens of an answer; default 2048."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=SAMPLING, help="Most tokens of image, conversation and answer together."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, metavar="N", rich_help_panel=SAMPLING, help="Above 0 draws; default: the likeliest words."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", rich_help_panel=SAMPLING, help="Draw among the likeliest words up to this probability."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", rich_help_panel=SAMPLING, help="Draw among this many words; 1 is no draw."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", rich_help_panel=SAMPLING, help="Same seed, same draw.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            show_default=False,
            rich_help_panel=LOADING,
            help="auto, bfloat16, float16 or float32; auto is as stored.",
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", show_default=False, rich_help_panel=LOADING, help="auto, cpu, cuda, cuda:1 or mps."
        ),
    ] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=LOADING, help="int8, or nf4 with bitsandbytes: less memory."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "--local-tokenizer",
            metavar="PATH",
            rich_help_panel=LOADING,
            help="Folder or hub id, where the model's folder has none (CogVLM v1: a Vicuna-7B).",
        ),
    ] = None,
    from_pretrained: Annotated[
        str | None,
        typer.Option("--from-pretrained", metavar="MODEL", rich_help_panel=RELEASED, help="The same as MODEL."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", rich_help_panel=RELEASED, help="--dtype float16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", rich_help_panel=RELEASED, help="--dtype bfloat16.")] = False,
    quant: Annotated[
        int | None, typer.Option("--quant", metavar="8|4", rich_help_panel=RELEASED, help="8: int8, 4: nf4.")
    ] = None,
    stream_chat: Annotated[
        bool, typer.Option("--stream-chat", rich_help_panel=RELEASED, help="Answers always come word by word.")
    ] = False,
    chinese: Annotated[bool, typer.Option("--chinese", rich_help_panel=RELEASED, help="--lang zh.")] = False,
    english: Annotated[bool, typer.Option("--english", rich_help_panel=RELEASED, help="--lang en.")] = False,
) -> int:
    """Talk with a model about an image, or without one.

    Answers come word by word; the conversation is remembered. /help lists what else can be typed: another image, save,
    start anew. [bold]clear[/bold] and [bold]stop[/bold] work as in the released demos, and so do their option names,
    with _ or -.

    Through a pipe every line is a question; a first line that names an image is the image.
    """
    from lavish.cli.loading import choose_dtype, choose_quantization

    words = WORDINGS[choose_language(_language(language, chinese=chinese, english=english))]
    name = _model(model, from_pretrained)
    dtype = choose_dtype(dtype, fp16=fp16, bf16=bf16)
    quantization = choose_quantization(quantization, quant)
    generation = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "grounding": grounding,
    }
    from lavish.cli.dialogue import COMMANDS, Dialogue, check_template
    from lavish.cli.loading import describe, load_model
    from lavish.cli.screen import Pipes, Terminal
    from lavish.cli.terminal import working

    with working(words.loading.format(name=name or "pocket")):
        from lavish.inference.options import parse_options

        parse_options(generation)  # what is wrong is said before minutes of loading
        if template is not None:
            check_template(template)
    vlm = load_model(
        name,
        dtype=dtype,
        device=device,
        quantization=quantization,
        tokenizer=tokenizer,
        words=(words.loading, words.loaded),
    )
    is_terminal = sys.stdin.isatty()
    screen = Terminal(COMMANDS) if is_terminal else Pipes()
    if is_terminal:
        say(f"{describe(vlm)}\n{words.hints}\n", style="dim")
    dialogue = Dialogue(
        vlm,
        screen,
        words,
        generation=generation,
        template=template,
        name=(name or "pocket").rstrip("/").rpartition("/")[2],
        asks_nothing_first=no_prompt,
    )
    return dialogue.run(image)


def _language(language: str | None, *, chinese: bool, english: bool) -> str | None:
    asked = {value for value, is_given in ((language, language), ("zh", chinese), ("en", english)) if is_given}
    if len(asked) > 1:
        raise ConfigError("--lang, --chinese and --english contradict each other; give one of them.")
    found = asked.pop() if asked else None
    if found is not None and found not in LANGUAGES:
        raise ConfigError(f"--lang {found}: there is {' and '.join(LANGUAGES)}.{did_you_mean(found, LANGUAGES)}")
    return found


def _model(model: str | None, from_pretrained: str | None) -> str | None:
    if model is not None and from_pretrained is not None and model != from_pretrained:
        raise ConfigError(f"MODEL {model} and --from_pretrained {from_pretrained} contradict each other; give one.")
    return model or from_pretrained
