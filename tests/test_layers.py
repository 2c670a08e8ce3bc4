"""The house's own rules, kept by reading the source: who may import whom, names, and what no file may mention.

Nothing of lavish is imported here; every module under `src/lavish` is parsed.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lavish"

# A room may import from itself and from the rooms of earlier lines. In `models`, families never import families.
ROOMS = [
    ("common",),
    ("nn", "checkpoints"),
    ("processors",),
    ("models",),
    ("datasets",),
    ("inference",),
    ("tasks",),
    ("runners",),
    ("serve",),
    ("cli",),
]
STEP = {room: step for step, rooms in enumerate(ROOMS) for room in rooms}
DATA_ROOMS = {"configs", "pocket"}  # files only: no code
EXTRA_PACKAGES = {  # package: rooms that may import it
    "peft": {"inference", "runners"},
    "accelerate": {"inference", "runners"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "gradio": {"serve"},
    "typer": {"cli"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "torchvision", "matplotlib"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common2"}
MAX_NETWORK_LINES = 600
MAX_FUNCTION_LINES = 40
LONG_FUNCTIONS = {  # function: why it may be longer
    "lavish.cli.chat.command": "its options, each checked and passed on by name",
    "lavish.cli.predict.command": "as chat's",
    "lavish.checkpoints.loading.load_into": "one pass over the tensors, whose state every step needs",
    "lavish.inference.load.load": "the front door: every option of it is resolved here, one after the other",
}

# Written in pieces so that this file does not find itself.
MACHINE_WORDS = [
    re.compile(r"(?<![\w.-])/(?:wo" r"rk|fa" r"rm|ro" r"ot)/"),
    re.compile(r"/opt/(?:wh" r"eels|py" r"pi)"),
    re.compile(r"\b(?:extra-)?index" r"-url\b"),
    re.compile(r"py" r"pi\.org|files\.python" r"hosted|download\.py" r"torch\.org|npm" r"js\.org", re.IGNORECASE),
    re.compile(r"\bsub" r"agent", re.IGNORECASE),
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[tuple[int, str]]:
    """Give (line, absolute dotted name) of each import; `from a import b` gives `a.b`, a module or what is in one."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in run_at_import(tree(path)) if only_at_import else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when the module is imported: no function bodies, nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from run_at_import(other)
            continue
        yield child
        yield from run_at_import(child)


def room_of(dotted: str) -> str:
    """Give `nn` of `lavish.nn.rope`, "" of `lavish` itself and of its own names (`lavish.load`)."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "lavish" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


def family_of(dotted: str) -> str:
    """Give `cogvlm` of `lavish.models.cogvlm.model`, "" of what all families share (`lavish.models.base_model`)."""
    parts = dotted.split(".")
    is_family = parts[:2] == ["lavish", "models"] and len(parts) > 2 and (PACKAGE / "models" / parts[2]).is_dir()
    return parts[2] if is_family else ""


def tracked_text_files() -> list[Path]:
    """Give the files that git tracks or would, fixtures' binary data apart; without git, the source tree."""
    list_files = ["git", "-c", "core.quotepath=off", "ls-files", "-co", "--exclude-standard"]
    answer = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode == 0:
        paths = [ROOT / line for line in answer.stdout.splitlines()]
    else:
        folders = ("src", "tests", "scripts", "docs", "benchmarks")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    binary = {".png", ".jpg", ".webp", ".safetensors", ".bin", ".pt", ".npz", ".npy", ".model", ".ico", ".pyc"}
    return [path for path in paths if path.is_file() and path.suffix not in binary]


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    here = module_name(path)
    room, family = room_of(here), family_of(here)
    wrong = []
    for line, target in imports(path):
        other = room_of(target)
        if target == "lavish" or target.startswith("lavish."):
            if not other and room and target != "lavish.__version__":
                wrong.append(f"line {line}: {target}: rooms import from rooms, not from the front door")
            elif room and other not in ("", room) and STEP.get(other, -1) >= STEP.get(room, 99):
                wrong.append(f"line {line}: {target}: {other} does not lie below {room}")
            elif family and family_of(target) not in ("", family):
                wrong.append(f"line {line}: {target}: a family imports another family")
        package = target.split(".")[0]
        if package in EXTRA_PACKAGES and room not in EXTRA_PACKAGES[package]:
            wrong.append(f"line {line}: {package} is imported in {sorted(EXTRA_PACKAGES[package])} only")
        if target.endswith(".*"):
            wrong.append(f"line {line}: import *")
    assert not wrong, f"{path.relative_to(ROOT)}:\n" + "\n".join(wrong)


def test_every_room_is_known() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(STEP) | DATA_ROOMS, "a new room needs a step in ROOMS"
    for room in rooms & DATA_ROOMS:
        code = [path for path in (PACKAGE / room).rglob("*.py") if path.name != "__init__.py"]
        assert not code, f"{room} is for data"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_names(path: Path) -> None:
    parts = module_name(path).split(".")
    assert not FORBIDDEN_NAMES & set(parts), f"{path.relative_to(ROOT)}: name it after what it does"


@pytest.mark.parametrize(
    "path", [path for path in modules() if room_of(module_name(path)) in ("", "common", "cli")], ids=module_name
)
def test_light_rooms_import_nothing_heavy(path: Path) -> None:
    heavy = [f"line {line}: {name}" for line, name in imports(path, only_at_import=True) if name.split(".")[0] in HEAVY]
    assert not heavy, f"{path.relative_to(ROOT)} imports at its top what only some calls need:\n" + "\n".join(heavy)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_no_code_of_checkpoints_or_pickles_runs(path: Path) -> None:
    """`trust_remote_code=True`, `torch.load(weights_only=False)`, `eval` and `exec` stand nowhere."""
    wrong = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if options.get("trust_remote_code", "False") != "False":
            wrong.append(f"line {node.lineno}: trust_remote_code")
        if called in ("torch.load", "load_with_torch") and options.get("weights_only") != "True":
            wrong.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called in ("eval", "exec", "pickle.load", "pickle.loads"):
            wrong.append(f"line {node.lineno}: {called}")
    assert not wrong, f"{path.relative_to(ROOT)}:\n" + "\n".join(wrong)


def test_dependencies_start_where_known_holes_are_closed() -> None:
    """Of torch.load, which reads a run's own checkpoints (CVE-2026-24747), and of Pillow (CVE-2026-40192)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(re.match(r"([\w.-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    assert [int(part) for part in lowest["torch"].split(".")] >= [2, 10]
    assert [int(part) for part in lowest["pillow"].split(".")] >= [12, 2]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("models/*/model.py")), ids=lambda path: path.parent.name)
def test_a_network_is_one_readable_file(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_NETWORK_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines"


def num_body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines, signature and docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    """Under 40 lines, `forward` apart: a network's is read from top to bottom."""
    found = {
        f"{module_name(path)}.{node.name}"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name != "forward"
        and num_body_lines(node) > MAX_FUNCTION_LINES
    }
    assert not found - set(LONG_FUNCTIONS), f"over {MAX_FUNCTION_LINES} lines: {sorted(found - set(LONG_FUNCTIONS))}"
    assert not set(LONG_FUNCTIONS) - found, f"short again: {sorted(set(LONG_FUNCTIONS) - found)}"


def test_names_of_test_modules_are_unique() -> None:
    """pytest imports them by their bare name, and leaves the second of two out."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_tolerances_stand_in_one_file(path: Path) -> None:
    """`rtol=` and `atol=` are named in tests/tolerance.py with their reason; 0 alone, which is exact, needs none."""
    if path.name == "tolerance.py":
        return
    found = [
        f"line {keyword.value.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"
        for call in ast.walk(tree(path))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in ("rtol", "atol")
        and any(isinstance(node, ast.Constant) and node.value != 0 for node in ast.walk(keyword.value))
    ]
    assert not found, f"{path.relative_to(ROOT)}: name these in tests/tolerance.py:\n" + "\n".join(found)


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in tracked_text_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for word in MACHINE_WORDS:
            if match := word.search(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]}")
    assert not found, "take these out:\n" + "\n".join(found)
