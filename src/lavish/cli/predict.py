"""`lavish predict`: one question on one image, or many into a JSONL file."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.asking import Seen, ask_alone, check_options, may_caption, messages_of, samples_of
from lavish.cli.terminal import CONTROL, Progress, console, human_seconds, say, say_error
from lavish.common.errors import ConfigError, DataError, LavishError, MediaError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from lavish.cli.questions import Answers, Question
    from lavish.inference.vlm import VLM, Reply

FAILED = 1
SHOWN_FAILURES = 20


def command(
    context: typer.Context,
    model: options.Model = None,
    inputs: Annotated[
        str | None, typer.Argument(metavar="INPUT", show_default=False, help="The same as --input.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", metavar="FILE", help="An image: path or URL; several for models that see several."
        ),
    ] = None,
    video: options.Video = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question", "--prompt", "-q", metavar="TEXT", help="What to ask; in a JSONL the lines may say it."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", metavar="PATH", help="Folder of images, glob in quotes, or JSONL: many questions."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSONL of the answers; default: stdout.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Questions computed together.")] = 4,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what failed in an earlier run; the new lines come last.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew if --output exists.")] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images that a JSONL names by https URL.")
    ] = False,
    template: options.Template = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_length: options.MaxLength = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    grounding: options.Grounding = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    tokenizer: options.Tokenizer = None,
    adapter: options.Adapter = None,
    base: options.Base = None,
    piece: options.Pieces = None,
    config: options.Config = None,
    tensor_parallel: options.TensorParallel = None,
) -> int:
    """Ask one question about one image, or one about each of many.

    One: --image and --question; the answer is printed.

    Many: --input is a folder (with its subfolders), a glob, or a JSONL file with a line
    {"image": "a.png", "question": "...", "id": "any"} for each; image (none: text alone), id, and with --question also
    question may be left out, which asks a model that captions for a caption. "images" is a list of images, for models
    that see several, and "video" a file. Paths are relative to the file, else to the working folder.

    Each input becomes one line of --output, in order: id, image, question, answer, finish_reason, usage, model; boxes
    where they are read (phrase, boxes in thousandths, boxes_px); or error and error_type instead of the answer. A run
    that was stopped or killed goes on where it was when it is started again with the same options, which
    stand beside the output in FILE.run.json. The exit status is 1 if an input failed.

    MindFormers' command line for CogVLM2 is taken too: --config YAML --predict-data IMAGE TEXT --modal-type image text
    --load-checkpoint FILE; docs/mindformers.md says what its YAML means here.
    """
    many = _one_source(inputs, source)
    _check_model(model)
    if many is not None and images:
        raise ConfigError("--image is one image and --input are many; give one of them.")
    if video is not None and (many is not None or images):
        raise ConfigError("--video is one video; give it without --image and --input.")
    if many is None and not images and video is None and question is None:
        raise ConfigError("Nothing to ask: give --image and --question, or --input. See lavish predict --help.")
    if many is None and (output or retry_failed or overwrite):
        raise ConfigError("--output, --retry-failed and --overwrite belong to --input; one answer is printed.")
    if output is not None and str(output) != "-":
        output = output.expanduser()
    from lavish.cli.questions import Answers, read_questions

    questions = None if many is None else read_questions(many, question, may_caption=may_caption(model))
    from lavish.inference.options import parse_options

    generation: dict[str, Any] = {
        "chat_template": template,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "grounding": grounding,
    }
    parse_options(generation)
    if template is not None:
        from lavish.cli.dialogue import check_template, template_warning

        check_template(template)
        if (warning := template_warning(model, template)) is not None:
            say(warning)
    loading: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "tokenizer": tokenizer}
    more = {"adapter": adapter, "base": base, "pieces": piece, "config": config}
    loading |= {name: value for name, value in more.items() if value is not None}
    from lavish.cli import processes

    def load() -> VLM:
        from lavish.cli.loading import load_model

        return load_model(model, device=device, **loading)

    def ask(load: Callable[[], VLM]) -> int:
        if questions is None:
            _ask_one(load, images or [], video, question or "", generation)
            return 0
        answers = Answers(None if output is None or str(output) == "-" else output)
        settings = {"model": model or "pocket", **generation, **loading}
        answers.open(questions, settings, overwrite=overwrite, retry_failed=retry_failed)
        with closing(answers):
            for note in answers.notes:
                say(note)
            if all(item.id in answers.done for item in questions):
                return _report(answers, questions, 0.0)
            run = Run(load(), answers, model or "pocket", generation, batch_size, allow_urls=allow_urls)
            return run.ask_all(questions)

    return processes.run(tensor_parallel, context.find_root().obj, device, load, ask)


def _one_source(inputs: str | None, source: str | None) -> str | None:
    if inputs is not None and source is not None and inputs != source:
        raise ConfigError(f"INPUT {inputs} and --input {source} contradict each other; give one.")
    return inputs or source


def _check_model(model: str | None) -> None:
    """Find a folder of pictures, a picture or a JSONL that stands where MODEL does."""
    from lavish.cli.dialogue import IMAGE_SUFFIXES

    path = Path(os.path.expanduser(model or ""))
    if model is None or not os.path.exists(path):
        return
    names = sorted(os.listdir(path)) if path.is_dir() else []
    if "config.json" in names or "adapter_config.json" in names:
        return
    pictures = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if pictures:
        what, option = f"a folder with pictures ({pictures[0]}) and no model", "--input"
    elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        what, option = "a picture and no model", "--image"
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        what, option = "a file of questions and no model", "--input"
    else:
        return
    raise ConfigError(f"{model}: {what}. Write lavish predict {option} {model}; MODEL may be left out or come first.")


def _ask_one(
    load: Callable[[], VLM], images: list[str], video: str | None, question: str, generation: dict[str, Any]
) -> None:
    from lavish.cli.dialogue import plain_path, video_path
    from lavish.common.media import open_image

    # Before the model: a wrong path is found at once. The user typed it, so it may be a URL.
    pictures = [open_image(plain_path(image), allow_urls=True) for image in images]
    seen = Seen(pictures, None if video is None else video_path(video))
    text = ask_alone(load(), seen, question, generation)
    print(CONTROL.sub("", text) if sys.stdout.isatty() else text)


class Run:
    """Many questions, a batch at a time, each answered or failed on its own."""

    def __init__(
        self,
        vlm: VLM,
        answers: Answers,
        model: str,
        generation: dict[str, Any],
        batch_size: int,
        *,
        allow_urls: bool = False,
    ):
        self.vlm, self.answers, self.model, self.generation = vlm, answers, model, generation
        self.batch_size, self.allow_urls = batch_size, allow_urls

    def ask_all(self, questions: list[Question]) -> int:
        """Ask what has no line yet, and give the exit status."""
        from concurrent.futures import ThreadPoolExecutor

        check_options(self.vlm, self.generation)
        num_done = len(self.answers.done)
        if num_done:
            say(f"{num_done} of {len(questions)} are in {self.answers.path} already; going on with the others.")
        if self.answers.repaired:
            say("The last line of it was torn when the earlier run was killed; it is asked again.")
        left = [item for item in questions if item.id not in self.answers.done]
        progress = Progress(len(questions), num_done)
        try:
            with ThreadPoolExecutor(max_workers=4) as pool, progress:
                for batch, seen in self._batches(left, pool):
                    rows = self._rows(batch, seen)
                    self.answers.write(rows)
                    self.answers.done.update({row["id"]: row for row in rows})
                    progress.advance(len(rows), sum("error" in row for row in rows))
        except KeyboardInterrupt:
            where = f" {self.answers.path} keeps them; the same command goes on." if self.answers.path else ""
            say(f"stopped: {len(self.answers.done)} of {len(questions)} are done.{where}")
            raise
        return _report(self.answers, questions, progress.elapsed_s)

    def _batches(self, left: list[Question], pool: Executor) -> Iterator[tuple[list[Question], list[Any]]]:
        """Give each batch with what it is about, opened; that of the next one are opened while the network computes."""
        ahead: deque[tuple[list[Question], list[Future[Any]]]] = deque()
        for start in range(0, len(left), self.batch_size):
            batch = left[start : start + self.batch_size]
            ahead.append((batch, [pool.submit(self._open, item) for item in batch]))
            if len(ahead) > 1:
                yield _opened(*ahead.popleft())
        if ahead:
            yield _opened(*ahead.popleft())

    def _open(self, item: Question) -> Seen | LavishError:
        """Give what the question is about, or the error."""
        from lavish.cli.dialogue import is_url, video_path
        from lavish.common.fetch import shown_url
        from lavish.common.media import open_image

        if item.problem is not None:
            return DataError(item.problem)
        for image in item.pictures:
            if is_url(image) and not self.allow_urls:
                return MediaError(f"{shown_url(image)!r} is a URL; URLs of a JSONL are fetched with --allow-urls only.")
        try:
            pictures = [open_image(image, allow_urls=self.allow_urls) for image in item.pictures]
            return Seen(pictures, None if item.video is None else video_path(item.video))
        except LavishError as error:
            return error

    def _rows(self, batch: list[Question], seen: list[Any]) -> list[dict[str, Any]]:
        """Answer a batch; if it fails as a whole, each question alone, so that one does not cost the others."""
        outcomes: dict[int, Any] = {place: one for place, one in enumerate(seen) if isinstance(one, LavishError)}
        good = [place for place in range(len(seen)) if place not in outcomes]
        replies = self._try([seen[place] for place in good], [batch[place].question for place in good])
        if isinstance(replies, list):
            outcomes.update(zip(good, replies, strict=True))
        elif len(good) == 1:
            outcomes[good[0]] = replies
        else:
            for place in good:
                reply = self._try([seen[place]], [batch[place].question])
                outcomes[place] = reply[0] if isinstance(reply, list) else reply
        return [self._row(item, outcomes[place], seen[place]) for place, item in enumerate(batch)]

    def _try(self, seen: list[Seen], questions: list[str]) -> list[Reply] | list[str] | Exception:
        import torch

        if not seen:
            return []
        try:
            if "chat" not in self.vlm.capabilities:
                return samples_of(self.vlm, seen, questions)
            conversations = [messages_of(one, question) for one, question in zip(seen, questions, strict=True)]
            return self.vlm.batch(conversations, batch_size=self.batch_size, **self.generation)
        except (LavishError, torch.OutOfMemoryError) as error:
            return error

    def _row(self, item: Question, outcome: Any, seen: Any) -> dict[str, Any]:
        row = item.fields
        if isinstance(outcome, Exception):
            message = str(outcome).removeprefix("Conversation 0 of 1: ")
            return {**row, "error": message, "error_type": type(outcome).__name__, "model": self.model}
        if isinstance(outcome, str):  # of a model that holds no conversation
            return {**row, "answer": outcome, "model": self.model}
        row |= {"answer": outcome.text, "finish_reason": outcome.finish_reason}
        if outcome.boxes:
            sizes = [picture.size for picture in seen.pictures]
            row["boxes"] = [
                {
                    "phrase": entry.phrase,
                    "boxes": [list(box) for box in entry.boxes],
                    "boxes_px": [list(box.pixels(sizes[0])) for box in entry.boxes] if len(sizes) == 1 else [],
                }
                for entry in outcome.boxes
            ]
        usage = outcome.usage
        row["usage"] = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        return {**row, "model": self.model}


def _opened(batch: list[Question], seen: list[Future[Any]]) -> tuple[list[Question], list[Any]]:
    return batch, [one.result() for one in seen]


def _report(answers: Answers, questions: list[Question], seconds: float) -> int:
    """Say what came of all inputs, list the failed ones, and give the exit status."""
    rows = [answers.done[item.id] for item in questions]
    failures = [row for row in rows if "error" in row]
    where = f" -> {answers.path}" if answers.path else ""
    say(f"{len(rows) - len(failures)} answered, {len(failures)} failed, in {human_seconds(seconds)}{where}")
    for row in failures[:SHOWN_FAILURES]:
        say_error(f"{row['id']}: {row['error']}")
    if len(failures) > SHOWN_FAILURES:
        console(stderr=True).print(f"and {len(failures) - SHOWN_FAILURES} more; their lines have the field error")
    return FAILED if failures else 0
