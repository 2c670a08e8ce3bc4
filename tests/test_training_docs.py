"""docs/training.md lists the keys of `run:` as the code has them. `python tests/test_training_docs.py` writes them."""

from pathlib import Path

from lavish.common.schema import field_help
from lavish.runners.schema import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
HEAD = "are read by the tasks.\n\n"


def table() -> str:
    rows = ["| key | default | what |", "|---|---|---|"]
    for entry in field_help(RunConfig):
        text = " ".join(entry.help.split()).replace("|", "\\|")
        rows.append(f"| `{entry.key}` | `{entry.default}` | {text} |")
    return "\n".join(rows) + "\n"


def test_the_keys_are_those_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(HEAD)[2] == table()


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8").partition(HEAD)[0]
    PAGE.write_text(before + HEAD + table(), encoding="utf-8")
