"""`report.html` of an evaluation: the metrics, the worst cases and some of the others, in one file without links."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavish.common import grounding
from lavish.common.errors import LavishError

REPORT_FILE = "report.html"
NUM_WORST, NUM_OTHERS = 24, 12
MAX_SIDE = 224  # pixels of a shown picture
ANSWERS = ("answer", "caption", "prediction", "choice")
"""Keys of a result that are shown as the answer."""

Row = dict[str, Any]
OpenPicture = Callable[[Row], Any]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #767676; --bad: #c4453c; --good: #2e8b57; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 2rem 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p.sub, .note { color: var(--soft); margin: .2rem 0; }
table { border-collapse: collapse; margin: .4rem 0; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
th { border-bottom: 1px solid var(--line); font-weight: 600; } td.n, th.n { text-align: right; }
td.n { font-variant-numeric: tabular-nums; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; padding: .7rem; overflow-wrap: anywhere; }
.card img { display: block; margin: 0 0 .5rem; max-height: 14rem; max-width: 100%; border-radius: 4px; }
.card .q { font-weight: 600; } .card .k { color: var(--soft); font-size: .85em; }
.foot { display: flex; justify-content: space-between; }
.bar { background: var(--line); border-radius: 3px; height: 6px; margin: .5rem 0 .2rem; }
.bar i { background: var(--good); border-radius: 3px; display: block; height: 6px; }
.bar.low i { background: var(--bad); }
pre { background: #8881; border-radius: 8px; font-size: 13px; overflow: auto; padding: .8rem; }
svg text { fill: currentColor; font-size: 11px; } svg rect { fill: var(--good); opacity: .75; }
"""


def write_report(folder: Path, summary: Mapping[str, Any], splits: Sequence[tuple[Any, OpenPicture]]) -> Path:
    """Write the report of a run and give its path.

    Args:
        folder: of the run.
        summary: what metrics.json says.
        splits: each split's result (`SplitResult`) and what opens the picture of one of its rows.
    """
    record = summary["record"]
    model = record["model"]
    name = model.get("path") or f"{model.get('arch', '')} {model.get('model_type', '')}".strip() or "the pocket model"
    parts = [
        f"<h1>{escape(str(name))}</h1>",
        f"<p class=sub>task {escape(str(record['task']))}, {escape(', '.join(summary['splits']))}; recipe "
        f"{record['config_sha256'][:12]}</p>",
    ]
    for result, open_picture in splits:
        parts.append(_split(summary["splits"][result.name], result, open_picture))
    parts.append(f"<h2>Record</h2><pre>{escape(json.dumps(record, indent=2, ensure_ascii=False))}</pre>")
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(str(name))}: evaluation</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / REPORT_FILE
    partial = path.with_name(f"{REPORT_FILE}.partial")
    partial.write_text(page, encoding="utf-8", errors="replace")  # half a character, as annotations may hold it
    partial.replace(path)
    return path


def _split(summary: Mapping[str, Any], result: Any, open_picture: OpenPicture) -> str:
    parts = [f"<h2>{escape(result.name)}</h2><p class=sub>{summary['num_samples']:,} samples</p>"]
    if summary["metrics"]:
        parts.append(_table(summary["metrics"], "metric"))
    if summary.get("groups"):
        parts.append(_table(summary["groups"], f"{summary['headline']} of"))
    parts += [f"<p class=note>{escape(note)}</p>" for note in summary["notes"]]
    scored = [row for row in result.rows if "score" in row]
    if not scored:
        shown = [("Some answers", _spread(result.rows, NUM_WORST))]
    else:
        sign = 1 if summary["higher_is_better"] else -1
        scale = result.scores.measures[summary["headline"]].scale
        parts.append(_histogram([row["score"] for row in scored], summary["headline"], scale))
        shown = _sections(scored, sign)
    for title, rows in shown:
        if rows:
            limits = (_limits(scored, scale), sign) if scored else None
            cards = "".join(_card(row, open_picture, limits, summary.get("headline", "")) for row in rows)
            parts.append(f"<h3>{title}</h3><div class=cards>{cards}</div>")
    return "".join(parts)


def _sections(scored: Sequence[Row], sign: int) -> list[tuple[str, list[Row]]]:
    """Give the rows to show, worst first; where answers are right or wrong and nothing between, the two apart."""
    order = sorted(scored, key=lambda row: (sign * row["score"], row["index"]))
    if {row["score"] for row in order} <= {0.0, order[-1]["score"]} and sign > 0 and order[-1]["score"] > 0:
        wrong = [row for row in order if not row["score"]]
        right = order[len(wrong) :]
        return [
            (f"Wrong: {len(wrong):,} of {len(order):,}", _spread(wrong, NUM_WORST)),
            (f"Right: {len(right):,} of {len(order):,}", _spread(right, NUM_OTHERS)),
        ]
    return [("Worst cases", order[:NUM_WORST]), ("From worse to better", _spread(order[NUM_WORST:], NUM_OTHERS))]


def _table(named: Mapping[str, Mapping[str, Any]], title: str) -> str:
    rows = []
    for name, entry in named.items():
        interval = entry.get("interval")
        span = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        count = entry.get("num_samples", "")
        rows.append(
            f"<tr><td>{escape(name)}<td class=n><b>{number(entry['value'])}</b><td class=n>{span}<td class=n>{count}"
        )
    head = f"<tr><th>{escape(title)}<th class=n>value<th class=n>95 % interval<th class=n>samples"
    return f"<table>{head}{''.join(rows)}</table>"


def number(value: Any) -> str:
    """Give a metric as it is shown."""
    return f"{value:.4g}" if isinstance(value, int | float) else escape(str(value))


def _limits(rows: Sequence[Row], scale: float) -> tuple[float, float]:
    """Give the ends of the bars: those of a percentage, else 0 and the largest score."""
    values = [row["score"] for row in rows]
    return min(*values, 0.0), max(*values, 100.0 if scale == 100 else 1e-9)


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Take `count` of the rows, evenly."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)) if rows else []
    return [rows[int(place)] for place in places]


def _histogram(values: Sequence[float], name: str, scale: float) -> str:
    """Draw how the scores of single samples are spread; nothing where all are equal, or right or wrong alone."""
    if len(set(values)) < 3 or not np.isfinite(values).all():
        return ""
    counts, edges = np.histogram(values, bins=20, range=(0, 100) if scale == 100 else None)
    width, height, top = 24, 70, max(int(counts.max()), 1)
    bars = []
    for at, count in enumerate(counts):
        tall = height * count / top
        span = f"{edges[at]:.3g} to {edges[at + 1]:.3g}: {count}"
        place = f"x={at * width} y={height - tall:.1f} width={width - 2} height={tall:.1f}"
        bars.append(f"<rect {place}><title>{span}</title></rect>")
    label, below, right = f"{escape(name)} of single samples", height + 14, width * len(counts)
    texts = (
        f"<text x=0 y={below}>{edges[0]:.3g}</text>"
        f"<text x={right // 2} y={below} text-anchor=middle>{label}</text>"
        f"<text x={right} y={below} text-anchor=end>{edges[-1]:.3g}</text>"
    )
    return f"<svg width={right} height={height + 20} role=img aria-label='{label}'>{''.join(bars)}{texts}</svg>"


def _card(row: Row, open_picture: OpenPicture, limits: tuple[tuple[float, float], int] | None, headline: str) -> str:
    result = row.get("result", row.get("results"))
    parts = [_picture(open_picture, row)]
    if "question" in row:
        parts.append(f"<div class=q>{escape(row['question'])}</div>")
    for name, value in result.items() if isinstance(result, Mapping) else [("result", result)]:
        if not isinstance(result, Mapping) or name in ANSWERS or len(result) == 1:
            shown = "none" if value is None else str(value)
            parts.append(f"<div><span class=k>{escape(name)}</span> {escape(shown)}</div>")
    if row.get("reference") is not None:
        parts.append(f"<div><span class=k>right</span> {escape(_joined(row['reference']))}</div>")
    foot = f"<span>sample {row.get('index', row.get('indices'))}</span>"
    if limits is not None:
        (low, high), sign = limits
        share = 100 * (row["score"] - low) / (high - low or 1)
        kind = "bar low" if sign * share < sign * 50 else "bar"
        parts.append(f"<div class='{kind}'><i style='width:{max(share, 2):.0f}%'></i></div>")
        foot = f"<span>{escape(headline)} {row['score']:.4g}</span>{foot}"
    return f"<div class=card>{''.join(parts)}<div class='k foot'>{foot}</div></div>"


def _joined(reference: Any) -> str:
    """Give references as one text, each once with how often it was given."""
    if not isinstance(reference, list):
        return str(reference)
    counted: dict[str, int] = {}
    for one in reference:
        counted[str(one)] = counted.get(str(one), 0) + 1
    return " | ".join(f"{text} ({count})" if count > 1 else text for text, count in counted.items())


def _with_boxes(image: Image.Image, row: Row) -> Image.Image:
    """Draw what is right and what was answered, where the right thing is a box."""
    right = grounding.parse(row["reference"]) if isinstance(row.get("reference"), str) else []
    if not right:
        return image
    answered = grounding.parse(str(row["result"].get("answer", "")))
    named = [replace(entry, phrase="right") for entry in right] + [replace(one, phrase="answer") for one in answered]
    return grounding.draw(image, [entry for entry in named if entry.boxes], labels=True)


def _picture(open_picture: OpenPicture, row: Row) -> str:
    """Give the picture of a row as an image within the page; nothing where it has none."""
    try:
        image = open_picture(row)
    except LavishError as error:
        return f"<div class=note>{escape(str(error))}</div>"
    if not isinstance(image, Image.Image):
        return ""
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    small = _with_boxes(small, row)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    coded = base64.b64encode(data.getvalue()).decode("ascii")
    return f"<img width={small.width} height={small.height} alt='sample' src='data:image/jpeg;base64,{coded}'>"
