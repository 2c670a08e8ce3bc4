"""`lavish chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from lavish.cli import options
from lavish.cli.terminal import say
from lavish.cli.wording import LANGUAGES, WORDINGS, choose_language
from lavish.common.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lavish.inference.vlm import VLM

RELEASED = "Names of the released demos"


def command(
    context: typer.Context,
    model: options.Model = None,
    image: Annotated[
        str | None, typer.Option("--image", "-i", metavar="FILE", help="Image, path or URL; without it you are asked.")
    ] = None,
    video: options.Video = None,
    template: options.Template = None,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Ask the empty question about each new image (captions of base models).")
    ] = False,
    language: Annotated[
        str | None, typer.Option("--lang", metavar="en|zh", help="Language of the prompts; default: the locale's.")
    ] = None,
    grounding: options.Grounding = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_length: options.MaxLength = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    tokenizer: options.Tokenizer = None,
    adapter: options.Adapter = None,
    base: options.Base = None,
    piece: options.Pieces = None,
    config: options.Config = None,
    tensor_parallel: options.TensorParallel = None,
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
    from lavish.cli import processes
    from lavish.cli.asking import check_talks
    from lavish.cli.dialogue import COMMANDS, Dialogue, check_template, template_warning, video_path
    from lavish.cli.loading import describe, load_model
    from lavish.cli.screen import Pipes, Terminal
    from lavish.cli.terminal import working

    with working(words.loading.format(name=name or "pocket")):
        from lavish.inference.options import parse_options

        parse_options(generation)  # what is wrong is said before minutes of loading
        if template is not None:
            check_template(template)
            if (warning := template_warning(name, template)) is not None:
                say(warning)
        if image is not None and video is not None:
            raise ConfigError("--image and --video contradict each other; a conversation is about one of them.")
        clip = None if video is None else video_path(video)

    def load() -> VLM:
        vlm = load_model(
            name,
            dtype=dtype,
            device=device,
            quantization=quantization,
            tokenizer=tokenizer,
            adapter=adapter,
            base=base,
            pieces=piece,
            config=config,
            words=(words.loading, words.loaded),
        )
        check_talks(vlm, name)
        return vlm

    def talk(load: Callable[[], VLM]) -> int:
        vlm = load()
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
        return dialogue.run(image, clip)

    return processes.run(tensor_parallel, context.find_root().obj, device, load, talk)


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
