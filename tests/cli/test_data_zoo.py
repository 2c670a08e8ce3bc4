"""`lavish data list` and `lavish data fetch`, from a server of this process."""

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavish.cli import main
from lavish.common.registry import registry

ROWS = b'[{"image": "a.png", "caption": "x", "image_id": 1}]'
PLUGIN = """
from lavish.common.registry import registry
from lavish.datasets.builders.caption_builder import COCOCapBuilder


@registry.register_builder("own_captions")
class OwnCaptions(COCOCapBuilder):
    DATASET_CONFIG_DICT = {"default": "own_captions.yaml"}
"""
CONFIG = """
datasets:
  own_captions:
    data_type: images
    build_info:
      annotations:
        train: {url: "%s/train.json", storage: own/train.json}
        val: {url: "%s/val.json", storage: own/val.json}
      images: {storage: own/images}
"""


class Server(http.server.BaseHTTPRequestHandler):
    """Gives the same rows for every name."""

    asked: list[str] = []

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(ROWS)))
        self.end_headers()
        self.wfile.write(ROWS)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of one's own with a data set whose files lie on the server."""
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path / "cache"))
    for name in ("LAVISH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(registry._kinds["builder"], "entries", dict(registry._kinds["builder"].entries))
    monkeypatch.delitem(sys.modules, "own_captions", raising=False)
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}"
        (tmp_path / "own_captions.py").write_text(PLUGIN)
        (tmp_path / "own_captions.yaml").write_text(CONFIG % (url, url))
        yield str(tmp_path / "own_captions.py")
        running.shutdown()
        thread.join()
        sys.modules.pop("own_captions", None)


def test_fetch(plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "own_captions", "--plugin", plugin]) == 0
    printed = capsys.readouterr()
    for split in ("train", "val"):
        file = tmp_path / "cache" / "own" / f"{split}.json"
        assert file.read_bytes() == ROWS
        assert f"{file}  ({len(ROWS)} B)" in printed.out
    assert "own_captions: its images go here; its card says where they come from" in printed.err
    assert str(tmp_path / "cache" / "own" / "images") in printed.err
    assert len(Server.asked) == 2
    (tmp_path / "cache/own/images").mkdir()
    assert main(["data", "fetch", "own_captions", "--plugin", plugin]) == 0
    assert "its images are here" in capsys.readouterr().err
    assert len(Server.asked) == 2, "once"


def test_all_names_are_looked_up_before_the_first_download(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "own_captions", "coco_captin", "--plugin", plugin]) == 2
    assert "'coco_captin'. Did you mean 'coco_caption'" in capsys.readouterr().err
    assert Server.asked == []
    assert main(["data", "fetch", "snli_ve"]) == 2
    assert "no public URL is known" in capsys.readouterr().err
    assert main(["data", "fetch", "coco_vqa", "--type", "evl"]) == 2
    assert "Did you mean 'eval'" in capsys.readouterr().err


def test_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "coco/annotations/coco_karpathy_train.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(ROWS)
    assert main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.list_datasets())
    assert "1 of 3 here" in printed
    assert "0 of 3 here, yours" in printed
    assert main(["data", "list", "--json"]) == 0
    rows = {(row["name"], row["type"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows["coco_vqa", "eval"]["splits"] == ["val"]
    assert rows["coco_caption", "default"]["annotations_here"] == 1
    assert rows["coco_caption", "default"]["visual_data"] == str(tmp_path / "coco/images")
