"""Hostile checkpoints of every layout: refused with a typed error, quickly, in little memory, and nothing runs.

Every case goes through what a user can do with a path: inspect, check, load and convert; `hostile_corpus.py` makes the
cases and `hostile_probe.py` opens them, in processes of their own.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_corpus import CASES, FIXTURES, PICKLES, torch_zip

MAX_SECONDS = 2.0
MAX_BYTES = 200 << 20
MUST_REFUSE = ("load", "convert")

Ask = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Give a function (path, empty folder) -> outcome by door."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    whole = [
        FIXTURES / "cogvlm2/open/checkpoint",
        FIXTURES / "cogvlm_sat/open/checkpoint",
        FIXTURES / "blip_caption/open/checkpoint",
        FIXTURES / "clip_qwen/open/checkpoint",
        FIXTURES / "mindspore_ckpt/open/checkpoint/ms/cogvlm2-image_fp32.ckpt",
    ]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("hostile_probe.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        stdin, stdout = program.stdin, program.stdout

        def exchange(message: dict[str, Any]) -> Any:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            return json.loads(stdout.readline())

        out = tmp_path_factory.mktemp("warm")
        assert exchange({"whole": [str(path) for path in whole], "out": str(out)}) == "ready"
        yield lambda path, out, doors=(): exchange({"path": str(path), "out": str(out), "doors": list(doors)})
        stdin.close()


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_hostile_file_is_refused(tmp_path: Path, ask: Ask, name: str) -> None:
    make, word = CASES[name]
    folder, out, marker = tmp_path / "in", tmp_path / "out", tmp_path / "marker"
    folder.mkdir()
    path = make(folder, marker)
    before = sorted(str(file) for file in folder.rglob("*"))
    # Every layout's pickles go through the one interpreter: that `load` reaches it is enough, but for one of them.
    is_repeated = name.partition(": ")[2] in PICKLES and not name.startswith("hf")
    answers = ask(path, out, ("load",) if is_repeated else ())
    assert not marker.exists(), "it ran"
    assert sorted(str(file) for file in folder.rglob("*")) == before, "it wrote beside the checkpoint"
    for door, answer in answers.items():
        shown = f"{door}: {answer}"
        assert not answer["outcome"].startswith(("untyped", "crash")), shown
        assert answer["outcome"] != "opened" or door not in MUST_REFUSE, shown
        assert answer["seconds"] < MAX_SECONDS, shown
        assert answer["memory"] < MAX_BYTES, shown
        assert not answer["seen"], shown
    assert word in answers["load"]["says"], answers["load"]["says"]
    assert not (out / "convert" / "converted").exists()
    shutil.rmtree(folder)


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """The plain unpickler runs them: what is refused above would have run."""
    ran = []
    for name in (
        "reduce os.system",
        "builtins eval",
        "getattr chain",
        "stack global",
        "memo",
        "state",
        "nested pickle",
    ):
        marker = tmp_path / name.replace(" ", "_")
        pickle.loads(PICKLES[name][0](marker))
        ran.append(marker.exists())
    assert all(ran)


def test_a_whole_file_of_the_same_kind_opens(tmp_path: Path, ask: Ask) -> None:
    """The doors do open, so that a refusal above says something of the file."""
    answers = ask(FIXTURES / "cogvlm2/open/checkpoint", tmp_path / "out")
    assert {door: answer["outcome"] for door, answer in answers.items()} == dict.fromkeys(answers, "opened"), answers


def test_what_a_door_may_not_do_is_seen(tmp_path: Path) -> None:
    """The watch works: a write elsewhere and a process are noted."""
    program = (
        "import sys, subprocess; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import hostile_probe; seen = []\n"
        "sys.addaudithook(hostile_probe.watch(Path(sys.argv[2]) / 'out', seen))\n"
        "(Path(sys.argv[2]) / 'x').write_text('a'); subprocess.run(['true'])\n"
        "print(len([line for line in seen if line.startswith(('writes', 'subprocess'))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "2", done.stderr


def test_torch_zip_is_what_torch_reads(tmp_path: Path) -> None:
    """The frame in which the attacks stand is a real one."""
    import torch

    file = tmp_path / "x.bin"
    torch_zip(file, b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", {"version": b"3\n"})
    assert torch.load(file, weights_only=True) == {"a": 1}
