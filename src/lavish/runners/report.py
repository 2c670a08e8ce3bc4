"""`report.html` of a finished run: the losses, the scores, what learnt, the config and the machine, in one file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lavish.runners.evaluation_report import REPORT_FILE, STYLE
from lavish.runners.parts import Part
from lavish.runners.run_folder import PLOT_FILE, RunFolder


def write_report(folder: RunFolder, parts: Mapping[str, Part], cost: Mapping[str, Any], config: str) -> Path:
    """Write the report of a run and give its path.

    Args:
        folder: of the run.
        parts: what learnt, by part of the model.
        cost: what the run took, by name.
        config: the merged recipe as YAML.
    """
    sections = [
        ("Losses", _losses(folder)),
        ("Scores", _scores(folder.read_validations())),
        ("What it says", _samples(folder)),
        ("What learnt", _parts(parts)),
        ("What it took", _table([(name, _number(value)) for name, value in cost.items()])),
        ("Recipe", f"<pre>{escape(config)}</pre>"),
        ("Machine", f"<pre>{escape(_environment(folder.path))}</pre>"),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    name = escape(folder.path.name)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>
<body><h1>{name}</h1><p class="sub">A training run of lavish.</p>{body}</body></html>"""
    path = folder.path / REPORT_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _losses(folder: RunFolder) -> str:
    lines = folder.read_log()
    if not lines:
        return ""
    picture = _embedded(folder.path / PLOT_FILE, "losses over steps", "image/png")
    names = [name for name in lines[-1] if "loss" in name]
    rows = [(name, _number(lines[0].get(name)), _number(lines[-1][name])) for name in names]
    return picture + _table(rows, ("", f"step {lines[0]['step']}", f"step {lines[-1]['step']}"))


def _scores(lines: list[dict[str, Any]]) -> str:
    found = [line for line in lines if line["metrics"]]
    if not found:
        return ""
    names = list(dict.fromkeys(name for line in found for name in line["metrics"]))
    rows = [
        (line["split"], str(line["epoch"]), *(_number(line["metrics"].get(name)) for name in names)) for line in found
    ]
    return _table(rows, ("split", "epoch", *names))


def _samples(folder: RunFolder) -> str:
    """Show each sample with its answers over the run."""
    by_sample: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in folder.read_samples():
        by_sample.setdefault((row["split"], row["index"]), []).append(row)
    return f"<div class=cards>{''.join(_card(rows, folder) for rows in by_sample.values())}</div>" if by_sample else ""


def _card(rows: list[dict[str, Any]], folder: RunFolder) -> str:
    first = rows[0]
    parts = [_embedded(folder.path / first["picture"], "sample", "image/jpeg") if first["picture"] else ""]
    if first["question"]:
        parts.append(f"<div class=q>{escape(first['question'])}</div>")
    if first["reference"] is not None:
        parts.append(f"<div><span class=k>right</span> {escape(str(first['reference']))}</div>")
    answers: list[tuple[str, list[str]]] = []
    for row in rows:
        if not answers or answers[-1][0] != row["answer"]:
            answers.append((row["answer"], []))
        answers[-1][1].append(f"step {row['step']}")
    for answer, steps in answers:
        when = steps[0] if len(steps) == 1 else f"{steps[0]} to {steps[-1].removeprefix('step ')}"
        parts.append(f"<div><span class=k>{when}</span> {escape(answer) or '(nothing)'}</div>")
    return f"<div class=card>{''.join(parts)}</div>"


def _embedded(path: Path, name: str, kind: str) -> str:
    """Give a picture within the page; nothing where the file is gone."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{name}" style="max-width:100%" src="data:{kind};base64,{data}">'


def _parts(parts: Mapping[str, Part]) -> str:
    rows = [(name, f"{part.trained:,}", f"{part.frozen:,}") for name, part in parts.items()]
    return _table(rows, ("part", "learns", "frozen"))


def _table(rows: list[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    titles = "".join(f"<th{' class=n' if at else ''}>{escape(title)}</th>" for at, title in enumerate(head))
    lines = "".join(
        "<tr>" + "".join(f"<td{' class=n' if at else ''}>{escape(cell)}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{titles}</tr>' if head else ''}{lines}</table>"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _environment(folder: Path) -> str:
    path = folder / "environment.json"
    return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2) if path.is_file() else ""
