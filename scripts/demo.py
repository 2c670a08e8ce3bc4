"""`make demo`: the bundled pocket model answers three questions about a bundled picture, one of them by pointing."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lavish.common.errors import LavishError

if TYPE_CHECKING:
    from lavish import VLM

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "src" / "lavish" / "pocket" / "pictures" / "star-square-circle.png"
OUTPUT = ROOT / "demo" / "grounding.png"
QUESTIONS = (
    "What color is the star?",
    "图中的数字是多少？",
    "Where is the blue square? answer in [[x0,y0,x1,y1]] format.",
)
MAX_NEW_TOKENS = 64


def ask(vlm: "VLM", picture: Path, question: str, write: Callable[[str], object]) -> str:
    """Ask one question about a picture; give the answer, written piece by piece as it comes."""
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
    pieces = []
    for piece in vlm.stream([message], max_new_tokens=MAX_NEW_TOKENS):
        write(piece)
        pieces.append(piece)
    return "".join(pieces)


def show(text: str) -> None:
    print(text, end="", flush=True)


def demo(output: Path) -> None:
    """Load, ask, draw the boxes of the last answer to `output`, say how to go on."""
    started_s = time.perf_counter()
    print("Loading the pocket model ...", file=sys.stderr)
    import lavish
    from lavish.common import grounding
    from lavish.common.media import open_image

    vlm = lavish.load()
    print(f"Loaded in {time.perf_counter() - started_s:.1f} s.", file=sys.stderr)
    print(f"Picture: {PICTURE.relative_to(ROOT)}\n")
    answer = ""
    for question in QUESTIONS:
        show(f"Q: {question}\nA: ")
        started_s = time.perf_counter()
        answer = ask(vlm, PICTURE, question, show)
        show(f"   ({time.perf_counter() - started_s:.2f} s)\n\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    grounding.draw(open_image(PICTURE), grounding.parse(answer)).save(output)
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    print(f"The box of the last answer is drawn in {shown}\nTo go on yourself, type:\n")
    print(f"    .venv/bin/lavish chat --image {PICTURE.relative_to(ROOT)}\n")


def main() -> int:
    try:
        demo(OUTPUT)
    except LavishError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
