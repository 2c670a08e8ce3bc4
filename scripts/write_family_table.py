"""Write docs/families.md: what each family can do, read off the code. A test checks that the page is current."""

from __future__ import annotations

from pathlib import Path

from lavish.models import CAPABILITIES, FAMILIES, ZOO, Family

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
YES, NO = "yes", "-"
MEANINGS = {
    "chat": "conversations, `vlm.chat(messages)`",
    "stream": "the same, piece by piece",
    "batch": "many conversations at once, each as alone",
    "caption": "`vlm.caption(image)`",
    "answer": "`vlm.answer(image, question)`; GPTDialogue takes features of a video for the image",
    "embed": "`vlm.embed(images=[...], texts=[...])`: vectors to compare",
    "int8, nf4": "`quantization=` of `lavish.load`",
    "adapters": "LoRA folders: `adapter=` of `lavish.load`, `vlm.load_adapter(path, name)`, `vlm.set_adapter(name)`",
    "pieces": "released in pieces; those that are elsewhere are keywords of `lavish.load`",
    "held in": "layouts that `lavish convert --to` can write it in; all are read",
    "Auto classes": "after `lavish.register()`, `AutoModelForCausalLM.from_pretrained` and its like load its folders",
    "names": "known to `lavish zoo` by name",
}


def row(family: Family) -> list[str]:
    """Give the cells of one family."""
    talks = YES if "chat" in family.capabilities else NO
    cells = [YES if name in family.capabilities else NO for name in CAPABILITIES]
    pieces = ", ".join(f"`{name}=`" for name in family.pieces) or NO
    names = sum(entry.family == family.name for entry in ZOO)
    page = PAGE.parent / f"{family.name}.md"
    title = f"[{family.name}]({page.name})" if page.is_file() else family.name
    return [title, *cells, talks, talks, pieces, ", ".join(family.layouts), talks, str(names or NO)]


def page() -> str:
    """Give the whole page."""
    head = ["family", *MEANINGS]
    lines = [head, ["---"] * len(head), *(row(family) for family in FAMILIES)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    meanings = "\n".join(f"- **{name}**: {meaning}" for name, meaning in MEANINGS.items())
    return (
        "# Families\n\n"
        "What a loaded model of each family can do; what it cannot, it says in words. A row is what the family has:\n"
        "a BLIP file captions, answers or embeds, whichever it was trained for (`vlm.capabilities`).\n\n"
        f"{table}\n\n{meanings}\n\n"
        "This page is written by `scripts/write_family_table.py` from the table in `lavish.models`.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
