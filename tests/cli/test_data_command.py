"""`lavish data check` and `lavish data show` on small files: words, statuses, the page."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavish.cli import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
COGVLM2 = str(FIXTURES / "cogvlm2" / "open" / "checkpoint")


def turns(question: str, answer: str, image: str | None = "a.png") -> dict[str, Any]:
    row: dict[str, Any] = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    return row if image is None else {"image": image, **row}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty rows, the 17th without its picture."""
    Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / "a.png")
    lines = [turns("<image>\nWhat colour?", "Red.", "b.png" if at == 17 else "a.png") for at in range(1, 21)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def good(path: Path) -> Path:
    """Leave the wrong row out."""
    lines = [line for line in path.read_text().splitlines() if "b.png" not in line]
    path.write_text("\n".join(lines))
    return path


def test_good_data(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(good(rows))]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("llava", "19", "76 characters", "No problem found."))


def test_the_missing_picture_of_row_17(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(rows)]) == 1
    printed = capsys.readouterr().out
    assert "rows.jsonl, row 17: the picture or video 'b.png' is missing; looked in" in printed
    assert "1 of 20 rows have a problem." in printed


def test_json(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(rows), "--json", "--quick", "--limit", "18"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["format"], said["num_rows"], said["num_bad"]) == ("llava", 18, 1)
    assert said["problems"][0]["where"] == "rows.jsonl, row 17"


def test_with_a_model(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(good(rows)), "--model", COGVLM2]) == 0
    printed = capsys.readouterr().out
    assert "of them learnt" in printed
    assert "longest" in printed
    assert main(["data", "check", str(rows), "--model", COGVLM2, "--max-length", "5"]) == 1
    assert "tokens, pictures included, and 5 are the most." in capsys.readouterr().out
    assert main(["data", "check", str(rows), "--max-length", "5"]) == 2
    assert "give --model too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ("", 2, "the file is empty"),
        ("[]", 2, "holds no rows"),
        (json.dumps([turns("<image>?", "x", None)]), 1, "0 pictures or videos, and 1 places"),
        (json.dumps([turns("Hi", "", None)]), 1, "nothing is learnt of it"),
        (json.dumps([{"conversations": turns("?", "x", None)["conversations"][::-1]}]), 1, "starts the conversation"),
    ],
)
def test_bad_data(content: str, status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert main(["data", "check", str(tmp_path / "rows.json")]) == status
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


def test_a_name_that_is_no_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Linux takes any bytes for a file's name; here a captcha, whose name is the answer."""
    Image.new("RGB", (8, 6)).save(tmp_path / "\udce9.png")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "\\udce9.png" in capfd.readouterr().out
    assert main(["data", "check", str(tmp_path), "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["problems"][0]["where"] == "\udce9.png"
    page = tmp_path / "page.html"
    assert main(["data", "show", str(tmp_path), "--out", str(page)]) == 1
    assert "\\udce9.png" in page.read_text(encoding="utf-8")


def test_places_that_cannot_be_written(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, told in (
        (tmp_path, "is a folder; name the file to write"),
        (rows / "page.html", "cannot be written"),
        ("~nobodys-folder/page.html", "no such home folder is known"),
    ):
        assert main(["data", "show", str(rows), "-n", "1", "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert main(["data", "convert", str(rows), str(rows / "x.jsonl"), "--skip-bad"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["data", "convert", str(rows), "~nobodys-folder/x.jsonl"]) == 2
    assert "no such home folder is known" in capsys.readouterr().err


def test_many_problems_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([turns("Hi", "", None)] * 30))
    assert main(["data", "check", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr().out
    assert "... and 10 more; --json prints them." in printed
    assert "note: no row has a picture or video." in printed


def test_show(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    command = ["data", "show", str(rows), "-n", "2", "--out", str(page), "--model", COGVLM2]
    assert main(command) == 0
    assert f"{page}: 2 rows" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 2
    assert "data:image/jpeg;base64," in text
    assert main([*command, "--start", "16"]) == 1, "row 17 is among them"
    assert "b.png" in page.read_text(encoding="utf-8")
    assert main([*command, "--start", "21"]) == 2
    assert "has no such row" in capsys.readouterr().err


def test_the_bundled_model_is_the_default(rows: Path, tmp_path: Path) -> None:
    assert main(["data", "show", str(rows), "-n", "1", "--out", str(tmp_path / "page.html")]) == 0
    assert "the bundled model" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_without_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert "show" in capsys.readouterr().out + capsys.readouterr().err
    assert main(["data", "chek", "x"]) == 2
    assert "check" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom lavish.cli import main\n"
        "main(['data', '--help'])\nmain(['data', 'check', '--help'])\n"
        "print([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_check_without_a_model_needs_no_torch(rows: Path) -> None:
    program = (
        "import sys\nfrom lavish.cli import main\n"
        f"main(['data', 'check', {str(rows)!r}])\nprint('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "False"


def test_tokens_in_the_terminal(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "show", str(rows), "-n", "2", "--start", "16", "--print", "--model", COGVLM2]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "rows.jsonl, row 16" in printed
    assert "[picture: 11 slots]|" in printed
    assert "<|end_of_text|>|" in printed
    assert "'b.png' is missing" in printed


def test_convert(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "train.jsonl"
    assert main(["data", "convert", str(rows), str(out)]) == 2
    assert "row 17: the picture or video 'b.png' is missing" in capsys.readouterr().err
    assert not list(out.parent.glob("*")), "whole or not at all"
    assert main(["data", "convert", str(rows), str(out), "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "row 17" in said
    assert "19 rows, 1 were left out." in said
    assert main(["data", "check", str(out)]) == 0
    assert "messages" in capsys.readouterr().out
    assert main(["data", "convert", str(rows), str(out), "--skip-bad"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["data", "convert", str(rows), str(out), "--skip-bad", "--overwrite"]) == 0
    assert main(["data", "convert", str(rows), str(tmp_path / "x.json")]) == 2
    assert "call it x.jsonl" in capsys.readouterr().err
