"""The conversation of `lavish chat`: an image, questions and answers, and the commands between them.

Source: the release's basic_demo/cli_demo_sat.py (its dialogue, `clear` and `stop`). Not kept of it: an error loses the
history, and the drawing of one turn overwrites the last one's.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from lavish.cli.screen import Screen
from lavish.cli.terminal import human_seconds
from lavish.cli.wording import Wording
from lavish.common.errors import LavishError, MediaError, PromptError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from lavish.inference.vlm import VLM, Reply

ONLY_TEMPLATE = "chat"
"""The prompt format of the families that have one."""
COMMANDS = ("/image", "/clear", "/save", "/template", "/help", "/quit")
PLAIN_COMMANDS = {"clear": "/clear", "stop": "/quit", "/exit": "/quit", "/stop": "/quit"}
"""Other spellings; `clear` and `stop` are the released demo's."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DRAWING = "output.png"
FAILED, INTERRUPTED = 1, 130


class Leave(Exception):
    """The person wants to go; `status` is the exit status."""

    def __init__(self, status: int = 0):
        super().__init__(status)
        self.status = status


class Dialogue:
    """One person, one model, one conversation at a time.

    Args:
        vlm: the loaded model.
        screen: where lines come from and answers go.
        words: the language of prompts and notes.
        generation: options for `vlm.stream`.
        template: the prompt format; None is the model's own.
        name: how the model is called in front of its answers.
        asks_nothing_first: ask the empty question as soon as there is an image (the demos' --no_prompt).
        folder: where drawings go.
    """

    def __init__(
        self,
        vlm: VLM,
        screen: Screen,
        words: Wording,
        *,
        generation: dict[str, Any],
        template: str | None = None,
        name: str = "lavish",
        asks_nothing_first: bool = False,
        folder: Path | None = None,
    ):
        self.vlm, self.screen, self.words = vlm, screen, words
        self.generation, self.name, self.folder = generation, name, folder or Path.cwd()
        self.asks_nothing_first = asks_nothing_first
        self.messages: list[dict[str, Any]] = []
        self.image: Image | None = None
        self.image_name = ""
        self._named: list[tuple[Image, str]] = []
        self._unasked: list[Image] = []
        self.video: str | None = None
        self.template = template
        self._wants_image = False
        self._image_failed = False
        self._num_interrupts = 0
        self._status = 0

    def run(self, image: str | None = None, video: str | None = None) -> int:
        """Talk until the person leaves, and give the exit status: 1 if a question of a pipe failed.

        The first conversation is about `image`, or about the file `video`.

        Raises:
            LavishError: `image` cannot be opened, and nobody is there to name another.
        """
        try:
            self._wants_image = image is None and video is None
            if video is not None:
                self._set_image(None, "")
                self.video = video
                self.screen.note(self.words.video_set.format(name=Path(video).name))
                if self.asks_nothing_first:
                    self.ask("")
            if image is not None and not self._open(image):
                if not self.screen.is_interactive:
                    return 2
                self._wants_image = True
            while True:
                self._step()
        except Leave as leave:
            return leave.status or self._status
        except EOFError:
            return self._status

    # --- lines ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Read one line and do what it says."""
        if self._wants_image and self.screen.is_interactive:
            self._ask_image()
            return
        line = self._read(self.words.you).strip()
        if self._wants_image and (self._image_failed or looks_like_image(line)) and not is_command(line):
            # Nobody can be asked through a pipe: a first line that names an image is the image.
            self._take_image(line)
        elif line:
            self._wants_image = False
            self._do(line)

    def _ask_image(self) -> None:
        line = self._read(self.words.ask_image, wants_path=True).strip()
        if is_command(line):
            self._do(line)
        else:
            self._take_image(line)

    def _read(self, prompt: str, *, wants_path: bool = False) -> str:
        while True:
            try:
                line = self.screen.read(prompt, wants_path=wants_path)
            except KeyboardInterrupt:
                self._num_interrupts += 1
                if self._num_interrupts > 1 or not self.screen.is_interactive:
                    raise Leave(INTERRUPTED) from None
                self.screen.note(self.words.again_to_leave)
            else:
                self._num_interrupts = 0
                return line

    def _take_image(self, line: str) -> None:
        """Take a line as the answer to "which image?"; empty is none."""
        if not line:
            self._set_image(None, "")
            self.screen.note(self.words.image_none)
        elif not self._open(line):
            self._image_failed, self._status = True, FAILED

    def _do(self, line: str) -> None:
        """Run a command, or ask a question."""
        first, _, rest = line.partition(" ")
        name = PLAIN_COMMANDS.get(line, PLAIN_COMMANDS.get(first if line.startswith("/") else "", first))
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._command_image,
            "/clear": self._command_clear,
            "/save": self._command_save,
            "/template": self._command_template,
            "/help": self._command_help,
            "/quit": self._command_quit,
        }
        if name in commands:
            commands[name](rest.strip())
        elif re.fullmatch(r"/\w*", first):
            self.screen.error(
                self.words.unknown_command.format(name=first, hint=did_you_mean(first, [*COMMANDS, *PLAIN_COMMANDS]))
            )
        else:
            self.ask(line)

    # --- commands ---------------------------------------------------------------------------------------------------

    def _command_image(self, argument: str) -> None:
        if argument:
            self._open(argument)
        elif not self.screen.is_interactive:
            self._set_image(None, "")
        else:
            self._wants_image = True

    def _command_clear(self, argument: str) -> None:
        self._set_image(None, "")
        self._wants_image, self._image_failed = True, False
        self.screen.note(self.words.cleared)

    def _command_save(self, argument: str) -> None:
        if not self.messages:
            self.screen.error(self.words.nothing_to_save)
            return
        name = argument or f"chat-{datetime.now():%Y%m%d-%H%M%S}.md"
        path = Path(plain_path(name))
        text = self._as_json() if path.suffix == ".json" else self._as_markdown()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            self.screen.error(self.words.save_exists.format(path=path))
        except OSError as error:
            self.screen.error(self.words.save_failed.format(path=path, reason=error.strerror or error))
        else:
            self.screen.note(self.words.saved.format(path=path))

    def _command_template(self, argument: str) -> None:
        if not argument:
            self.screen.note(
                self.words.template_is.format(name=self.template_name, known=", ".join(templates(self.vlm.processor)))
            )
            return
        try:
            check_template(argument, self.vlm.processor)
        except PromptError as error:
            self.screen.error(str(error))
            return
        self.template = argument
        self.screen.note(self.words.template_set.format(name=argument))
        if argument == "base":
            self.screen.note(self.words.no_history.format(name=argument))

    def _command_help(self, argument: str) -> None:
        self.screen.note(self.words.help.format(templates=", ".join(templates(self.vlm.processor))))

    def _command_quit(self, argument: str) -> None:
        raise Leave

    @property
    def template_name(self) -> str:
        """The prompt format in use."""
        # Only a family with several templates has a field for the one of the checkpoint.
        return self.template or getattr(self.vlm.processor, "template_version", ONLY_TEMPLATE)

    # --- image ------------------------------------------------------------------------------------------------------

    def _open(self, source: str) -> bool:
        """Open an image that the person named; on failure say why, keep everything and give False."""
        from lavish.common.media import open_image

        source = plain_path(source)
        try:
            image = open_image(source, allow_urls=True)  # the person at the keyboard typed it
        except LavishError as error:
            self.screen.error(str(error))
            if self.image is not None:
                self.screen.note(self.words.image_keeps)
            return False
        except KeyboardInterrupt:
            self.screen.note(self.words.stopped)
            return False
        if self._takes_several and (self._named or self.messages or self.video):
            self.screen.note(self.words.image_joins)
            self._add_image(image, source)
        else:
            if self.messages:
                self.screen.note(self.words.new_image)
            self._set_image(image, source)
        shown = source if is_url(source) else Path(source).name
        self.screen.note(self.words.image_set.format(name=shown, width=image.width, height=image.height))
        if self.asks_nothing_first:
            self.ask("")
        return True

    def _set_image(self, image: Image | None, name: str) -> None:
        """Begin a conversation about an image, or about none."""
        self.image, self.image_name, self.messages, self.video = None, "", [], None
        self._named, self._unasked = [], []
        self._wants_image = self._image_failed = False
        if image is not None:
            self._add_image(image, name)

    def _add_image(self, image: Image, name: str) -> None:
        """Put an image into the next question; boxes are drawn on the newest."""
        self.image, self.image_name = image, name
        self._named.append((image, name))
        self._unasked.append(image)
        self._wants_image = self._image_failed = False

    @property
    def _takes_several(self) -> bool:
        # Only the processor of a family that was trained with several images says how many.
        return getattr(self.vlm.processor, "max_images", 1) != 1

    # --- questions --------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> Reply | None:
        """Ask a question and show the answer as it comes; None if it failed, and then the history is as before."""
        import torch

        seen: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self._unasked]
        if not self.messages and self.video is not None:
            seen.insert(0, {"type": "video", "video": self.video})
        content: Any = [*seen, {"type": "text", "text": question}] if seen else question
        messages = [*self.messages, {"role": "user", "content": content}]
        self.screen.begin(self.words.answer.format(name=self.name), self.words.thinking)
        started_s, problem, stream = time.monotonic(), "", None
        try:
            stream = self.vlm.stream(messages, chat_template=self.template, **self.generation)
            with stream:
                for piece in stream:
                    self.screen.piece(piece)
        except KeyboardInterrupt:
            self._num_interrupts += 1
        except LavishError as error:
            problem = str(error)
        except torch.OutOfMemoryError:
            problem = self.words.out_of_memory
        reply = None if stream is None else stream.reply
        self.screen.end("" if problem or reply is None else self._note(reply, time.monotonic() - started_s))
        if problem:
            self.screen.error(problem)
            self._status = FAILED
            return None
        if reply is None or (reply.finish_reason == "cancelled" and not reply.text):
            return None
        self.messages, self._unasked = [*messages, {"role": "assistant", "content": reply.text}], []
        if reply.boxes:
            self._draw(reply)
        return reply

    def _note(self, reply: Reply, seconds: float) -> str:
        count = reply.usage.completion_tokens
        notes = [self.words.timing.format(seconds=human_seconds(seconds), count=count, rate=count / max(seconds, 1e-9))]
        if reply.finish_reason == "cancelled":
            notes.insert(0, self.words.stopped)
        if reply.finish_reason == "length":
            notes.insert(0, self.words.cut.format(count=count))
        return " · ".join(notes)

    def _draw(self, reply: Reply) -> None:
        """Draw the boxes of an answer into a new file of the working folder."""
        from lavish.common import grounding

        if not any(entry.boxes for entry in reply.boxes):
            return
        if self.image is None:
            self.screen.note(self.words.no_image_for_boxes)
            return
        drawing = grounding.draw(self.image, reply.boxes)
        try:
            path = save_new(drawing, self.folder / DRAWING)
        except OSError as error:
            self.screen.error(self.words.draw_failed.format(reason=error.strerror or error))
            return
        self.screen.note(self.words.drawn.format(path=path.relative_to(self.folder)))
        for number, phrase in drawing.info["legend"].items():
            self.screen.note(f"  {number}: {phrase}")

    # --- saving -----------------------------------------------------------------------------------------------------

    def _as_json(self) -> str:
        names = {id(image): name for image, name in self._named}
        messages = json.loads(json.dumps(self.messages, default=lambda image: names[id(image)]))
        record = {"model": self.vlm.name, "template": self.template_name, "messages": messages}
        return json.dumps(record, ensure_ascii=False, indent=2) + "\n"

    def _as_markdown(self) -> str:
        lines = [f"# {self.vlm.name}\n"]
        lines += [f"![{name}](<{name}>)\n" for _, name in self._named]
        if self.video is not None:
            lines.append(f"[{self.video}](<{self.video}>)\n")
        for message in self.messages:
            content = message["content"]
            text = content if isinstance(content, str) else content[-1]["text"]
            title = self.words.user_title if message["role"] == "user" else self.name
            lines.append(f"**{title}**\n\n{text}\n")
        return "\n".join(lines)


FITTING = {"base": ("base",), "chat": ("chat", "chat_old", "vqa", "vicuna")}
"""Templates that a model can be asked with, by the one that its name tells."""


def templates(processor: Any = None) -> list[str]:
    """Name the prompt formats of a loaded model's family; without one those of all families, which are CogVLM's."""
    from lavish.models.cogvlm.processor import TEMPLATES, CogVLMProcessor

    return list(TEMPLATES) if processor is None or isinstance(processor, CogVLMProcessor) else [ONLY_TEMPLATE]


def check_template(name: str, processor: Any = None) -> str:
    """Give the name of a prompt format back.

    Raises:
        PromptError: there is none of this name.
    """
    from lavish.models.cogvlm.processor import ALIASES

    known = templates(processor)
    if ALIASES.get(name, name) not in known:
        raise PromptError(f"No template {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return name


def template_warning(model: str | None, name: str) -> str | None:
    """Say that a prompt format is not the one that a model of this name was trained with; None: it may be."""
    from lavish.models.cogvlm.sat_config import template_of_name

    trained = template_of_name(Path(model or "").name)
    if trained is None or name in FITTING[trained]:
        return None
    return f"{Path(model or '').name} was trained with the template {trained!r}, and {name!r} was asked for."


def is_url(text: str) -> bool:
    """Tell a URL from a path."""
    return text.lower().startswith(("http://", "https://"))


def plain_path(typed: str) -> str:
    """Give the path or URL that a person typed or dropped: without quotes, escaped spaces, file:// and `~`."""
    text = typed.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif not _is_file(text):
        text = re.sub(r"\\([ ()'&])", r"\1", text)
    if text.lower().startswith("file://"):
        text = unquote(urlsplit(text).path)
    return text if is_url(text) or text.startswith("data:") else os.path.expanduser(text)


def video_path(typed: str) -> str:
    """Give the path of a video that a person named.

    Raises:
        MediaError: there is no such file.
    """
    path = plain_path(typed)
    if is_url(path) or not _is_file(path):
        raise MediaError(
            f"The video {path!r} is no file (looked from {os.getcwd()!r}). URLs of videos are not fetched."
        )
    return path


def looks_like_image(line: str) -> bool:
    """Tell whether a line names an image and is no question."""
    if not line:
        return True
    path = plain_path(line)
    if is_url(path) or line.startswith("data:image/"):
        return " " not in line
    return (" " not in line and path.lower().endswith(IMAGE_SUFFIXES)) or _is_file(path)


def is_command(line: str) -> bool:
    """Tell a command from a path or a question."""
    return line in PLAIN_COMMANDS or line.partition(" ")[0] in COMMANDS


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a question is longer than a file name may be, or holds a NUL
        return False


def save_new(image: Image, path: Path) -> Path:
    """Save a picture under this name or, where that exists, with a number: no file is overwritten.

    Raises:
        OSError: the folder cannot be written.
    """
    number = 1
    while True:
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            with target.open("xb") as file:
                image.save(file, format="PNG")
            return target
        except FileExistsError:
            number += 1
