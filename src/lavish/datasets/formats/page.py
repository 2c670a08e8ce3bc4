"""Samples as a page of HTML: pictures, what was said, and the tokens that a model gets, with what of them is learnt.

One file without scripts and without anything from elsewhere: pictures are in it, small. Everything that comes from the
data is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, LavishError
from lavish.common.media import open_image
from lavish.common.messages import Message, normalize
from lavish.datasets.formats.checking import IGNORE_INDEX, problem_of
from lavish.datasets.formats.samples import Sample
from lavish.datasets.formats.writing import told

MAX_SIDE = 480
"""Pixels of a picture's longer side on the page."""
REPLACEMENT = "\ufffd"
MAX_BYTES_OF_CHARACTER = 6
"""Tokens that one character is made of at most, bytes of a tokenizer that knows it not."""


@dataclass(frozen=True)
class Piece:
    """Tokens that make one piece of text, or a run of image slots."""

    text: str
    ids: tuple[int, ...]
    first: int
    """Position of the first token."""
    kind: str
    """"learnt", "given", or "slots"."""
    is_special: bool = False


@dataclass
class Shown:
    """One row of the page."""

    where: str
    messages: list[Message] = field(default_factory=list)
    problem: str | None = None
    pieces: list[Piece] = field(default_factory=list)
    box: tuple[float, ...] | None = None
    """Corners as fractions, of rows with a target."""
    id: str = ""

    @property
    def num_tokens(self) -> int:
        """All tokens, image slots included."""
        return sum(len(piece.ids) for piece in self.pieces)

    def count(self, kind: str) -> int:
        """Give the number of tokens of a kind."""
        return sum(len(piece.ids) for piece in self.pieces if piece.kind == kind)


def look_at(where: str, sample: Sample | DataError, processor: Any = None) -> Shown:
    """Make what the page shows of one row; what is wrong with it becomes part of it."""
    if isinstance(sample, DataError):
        return Shown(where, problem=str(sample))
    shown = Shown(where, problem=problem_of(sample), box=sample.get("box"), id=sample["id"])
    try:
        shown.messages = normalize(sample["messages"], allow_videos=True)
        if processor is not None and shown.problem is None:
            inputs = processor.apply_chat_template(sample["messages"], return_labels=True, return_tensors=None)
            shown.pieces = pieces_of(inputs, processor.tokenizer)
            if not shown.count("learnt"):
                shown.problem = "its labels are all masked: no token of it is learnt."
    except LavishError as error:
        shown.problem = shown.problem or str(error)
    return shown


def pieces_of(inputs: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
    """Cut encoded tokens into pieces of text, each learnt or not, and runs of image slots."""
    ids, labels = list(inputs["input_ids"]), list(inputs["labels"])
    types = list(inputs.get("token_type_ids", [0] * len(ids)))
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))  # tiktoken has none
    kinds = [
        "slots" if kind == 1 else "given" if label == IGNORE_INDEX else "learnt"
        for kind, label in zip(types, labels, strict=True)
    ]
    pieces: list[Piece] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at < len(ids) and kinds[at] == kinds[start]:
            continue
        run = ids[start:at]
        if kinds[start] == "slots":
            pieces.append(Piece("", tuple(run), start, "slots"))
        else:
            pieces += _text_pieces(run, start, kinds[start], tokenizer, special)
        start = at
    return pieces


def _text_pieces(ids: Sequence[int], offset: int, kind: str, tokenizer: Any, special: set[int]) -> list[Piece]:
    """Decode tokens one by one, within a few of those before them; bytes of one character stay together."""

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(list(part), skip_special_tokens=False)

    pieces, done = [], 0
    for at in range(len(ids)):
        begin = max(0, done - MAX_BYTES_OF_CHARACTER)
        before, now = decode(ids[begin:done]) if begin < done else "", decode(ids[begin : at + 1])
        is_cut = now.endswith(REPLACEMENT) and at - done < MAX_BYTES_OF_CHARACTER and at + 1 < len(ids)
        if is_cut:
            continue
        own = tuple(ids[done : at + 1])
        text = now[len(before) :] if now.startswith(before) else decode(own)
        pieces.append(Piece(text, own, offset + done, kind, own[0] in special))
        done = at + 1
    return pieces


# -- the page


def write_page(path: Path, shown: Sequence[Shown], *, title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Write the page, whole or not at all. `facts` are (name, value) for its head.

    Raises:
        ConfigError: the path is a folder's.
        OutputError: it cannot be written.
    """
    from lavish.common.config import write_text

    text = page(shown, title=title, facts=facts).encode("utf-8", "backslashreplace")  # names of files need not be UTF-8
    with told(path):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name the file to write.")
        write_text(text.decode(), path)


def page(shown: Sequence[Shown], *, title: str, facts: Sequence[tuple[str, str]]) -> str:
    """Give the page as text."""
    head = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    legend = "".join(
        f"<span class='token {kind}'>{escape(word)}</span>"
        for kind, word in (("learnt", "learnt"), ("given", "given, masked"), ("slots", "slots of a picture"))
    )
    has_tokens = any(one.pieces for one in shown)
    cards = "\n".join(card(one, number) for number, one in enumerate(shown, start=1))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f"<dl>{head}</dl>{f'<p class=legend>{legend}</p>' if has_tokens else ''}</header>\n<main>{cards}</main>"
        "</body></html>\n"
    )


def card(one: Shown, number: int) -> str:
    """Give the part of one row."""
    name = f" <span class='id'>{escape(one.id)}</span>" if one.id and one.id != one.where else ""
    parts = [f"<h2><span class='number'>{number}</span> {escape(one.where)}{name}</h2>"]
    if one.problem is not None:
        parts.append(f"<p class='problem'>{escape(one.problem)}</p>")
    if one.messages:
        parts.append(f"<div class='said'>{''.join(bubble(message, one) for message in one.messages)}</div>")
    if one.pieces:
        total, learnt = one.num_tokens, one.count("learnt")
        share = f"{learnt / total:.0%}" if total else "0%"
        counts = f"{total:,} tokens · {learnt:,} learnt ({share}) · {one.count('slots'):,} slots of pictures"
        bar = "".join(f"<i class='{piece.kind}' style='flex:{len(piece.ids)}'></i>" for piece in _joined(one.pieces))
        tokens = "".join(token(piece) for piece in one.pieces)
        parts.append(f"<p class='counts'>{counts}</p><div class='bar'>{bar}</div><div class='tokens'>{tokens}</div>")
    return f"<article{' class=bad' if one.problem else ''}>{''.join(parts)}</article>"


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbours of a kind, for the bar."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind:
            found[-1] = Piece("", found[-1].ids + piece.ids, found[-1].first, piece.kind)
        else:
            found.append(piece)
    return found


def token(piece: Piece) -> str:
    """Give one piece: its text, with ids and position as its title."""
    ids = ", ".join(map(str, piece.ids[:6])) + (" …" if len(piece.ids) > 6 else "")
    where = f"{piece.first}" if len(piece.ids) == 1 else f"{piece.first} to {piece.first + len(piece.ids) - 1}"
    title = f"position {where}, id {ids}, {'learnt' if piece.kind == 'learnt' else 'masked (-100)'}"
    if piece.kind == "slots":
        return f"<span class='token slots' title='{escape(title)}'>picture · {len(piece.ids):,} slots</span>"
    text = escape(piece.text).replace("\n", "<b>↵</b><br>").replace("\t", "<b>⇥</b>")
    classes = f"token {piece.kind}{' special' if piece.is_special else ''}"
    return f"<span class='{classes}' title='{escape(title)}'>{text or '<b>∅</b>'}</span>"


def bubble(message: Message, row: Shown) -> str:
    """Give one message of a row with its pictures."""
    box = row.box if len(message.images()) == 1 else None
    pictures = "".join(picture(source, box, row.problem) for source in message.images())
    clips = "".join(f"<span class='clip'>▶ {escape(_name(source))}</span>" for source in message.videos())
    text = escape(message.text("\n")).replace("\n", "<br>")
    media = f"<div class='pictures'>{pictures}{clips}</div>" if pictures or clips else ""
    return f"<div class='message {message.role}'><span class='role'>{message.role}</span>{media}<p>{text}</p></div>"


def picture(source: Any, box: tuple[float, ...] | None, told: str | None = None) -> str:
    """Give a picture, small and inside the page, with its target; or why there is none, where `told` is not it."""
    try:
        opened = open_image(source)
    except LavishError as error:
        name = f"<span class='clip'>✕ {escape(_name(source))}</span>"
        return name if str(error) == told else f"<p class='problem'>{escape(str(error))}</p>"
    size = f"{opened.width} × {opened.height}"
    opened.thumbnail((MAX_SIDE, MAX_SIDE))
    stream = io.BytesIO()
    opened.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode()
    name = _name(source)
    mark = ""
    if box is not None:
        x0, y0, x1, y1 = (100 * value for value in box)
        place = f"left:{x0:.2f}%;top:{y0:.2f}%;width:{x1 - x0:.2f}%;height:{y1 - y0:.2f}%"
        mark = f"<i class='box' style='{place}'></i>"
    alt, caption = escape(f"picture {name}"), escape(f"{name} · {size}")
    return (
        f"<figure><div class='frame'><img src='data:image/jpeg;base64,{data}' alt='{alt}'>{mark}</div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _name(source: Any) -> str:
    is_path = isinstance(source, str) and not source.startswith("data:")
    return Path(source).name if is_path else "inside the data"


STYLE = """
:root{--paper:#f6f5f2;--card:#fff;--ink:#1c1b19;--soft:#6d6a64;--line:#dedbd4;--learnt:#cdeccd;--learnt-ink:#0f4a1f;
--given:#efede8;--given-ink:#55524c;--slots:#d6e4fb;--slots-ink:#163f80;--bad:#b3261e;--bad-paper:#fdecea;
--user:#eef3fb;--assistant:#eef7ee;--system:#f7f2e4}
@media (prefers-color-scheme:dark){:root{--paper:#161618;--card:#202124;--ink:#ececea;--soft:#a09d97;--line:#35363a;
--learnt:#1f4d2b;--learnt-ink:#c9f0cf;--given:#2c2d31;--given-ink:#b5b2ab;--slots:#1f3a63;--slots-ink:#cfe0fb;
--bad:#ff8a80;--bad-paper:#3b1f1d;--user:#232a36;--assistant:#20301f;--system:#332e1f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:24px 20px 0}
h1{font-size:22px;margin:0 0 12px;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:8px 28px;margin:0}
dt{color:var(--soft);font-size:12px}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.legend{display:flex;gap:8px;margin:16px 0 0;flex-wrap:wrap}
main{display:grid;gap:20px;padding-bottom:48px}
article{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px 20px;min-width:0}
article.bad{border-color:var(--bad)}
h2{font-size:14px;font-weight:600;margin:0 0 12px;overflow-wrap:anywhere}
.number{display:inline-block;min-width:24px;padding:0 6px;margin-right:4px;border-radius:12px;background:var(--ink);
color:var(--card);text-align:center;font-size:12px;line-height:24px}
.id{color:var(--soft);font-weight:400}
.problem{background:var(--bad-paper);color:var(--bad);border-radius:8px;padding:8px 12px;margin:0 0 12px;
overflow-wrap:anywhere}
.problem:last-child{margin:0}
.said{display:grid;gap:8px}
.message{padding:8px 14px 10px;border-radius:10px;max-width:86%;min-width:0}
.message p{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.user{background:var(--user);justify-self:start}.assistant{background:var(--assistant);justify-self:end}
.system{background:var(--system);justify-self:center}
.role{font-size:11px;color:var(--soft);text-transform:uppercase;letter-spacing:.06em}
.pictures{display:flex;flex-wrap:wrap;gap:10px;margin:6px 0}
figure{margin:0;max-width:100%}.frame{position:relative;display:inline-block;max-width:100%;line-height:0}
img{max-width:100%;max-height:320px;border-radius:8px;display:block}
.box{position:absolute;border:3px solid #e5484d;border-radius:3px;box-shadow:0 0 0 1px #fff}
figcaption{font-size:12px;color:var(--soft)}
.clip{padding:18px 14px;border-radius:8px;background:var(--slots);color:var(--slots-ink)}
.counts{color:var(--soft);font-size:13px;margin:16px 0 6px}
.bar{display:flex;height:8px;border-radius:4px;overflow:hidden;margin-bottom:10px}
.bar i{min-width:1px}
i.learnt,.token.learnt{background:var(--learnt)}i.given,.token.given{background:var(--given)}
i.slots,.token.slots{background:var(--slots)}
.token{display:inline;padding:1px 1px;border-radius:3px;box-decoration-break:clone;-webkit-box-decoration-break:clone;
white-space:pre-wrap;overflow-wrap:anywhere}
.tokens{font:13px/1.9 ui-monospace,"SFMono-Regular","DejaVu Sans Mono","Noto Sans Mono CJK SC",monospace;
max-height:420px;overflow:auto;border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.tokens .token{border-right:1px solid var(--card)}
.token.learnt{color:var(--learnt-ink)}.token.given{color:var(--given-ink)}.token.slots{color:var(--slots-ink)}
.tokens .slots,.legend .token{padding:2px 8px;border-radius:10px}
.token.special{font-weight:700}
.token b{opacity:.55;font-weight:400}
@media (max-width:640px){.message{max-width:100%}}
"""
