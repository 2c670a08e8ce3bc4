"""Streams: each row once a pass among all readers, an order of (seed, pass), and resume to the same weights."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from PIL import Image
from test_lavis_recipe import Swap, SwapTask, lines, same
from torch.utils.data import IterableDataset

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.datasets.datasets.laion_dataset import LaionDataset
from lavish.datasets.formats.dataset import ConversationStream
from lavish.runners.recipe import open_recipe, train
from lavish.runners.runner_base import RunnerBase
from lavish.runners.runner_iter import RunnerIter
from lavish.runners.schema import lavis_run_config
from lavish.runners.streams import RowStream, StreamBatches, StreamState

COUNT = 11


class Rows(IterableDataset):
    """Eleven points by number, the fifth of which is broken; remembers what was made into samples."""

    def __init__(self, broken: tuple[int, ...] = (4,)) -> None:
        self.points = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))
        self.broken, self.made, self.told = broken, [], []  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a runner reads rows")

    def rows(self, reader: int, readers: int, seed: str) -> Iterator[int]:
        order = list(range(COUNT))
        random.Random(seed).shuffle(order)
        return iter(order[reader::readers])

    def sample(self, row: int) -> dict[str, Any]:
        if row in self.broken:
            raise DataError(f"row {row} is broken.")
        self.made.append(row)
        return {"points": self.points[row] + 0.1 * torch.rand(2), "instance_id": str(row)}

    def note_broken(self, row: int, error: Exception) -> None:
        self.told.append(row)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "points": torch.stack([one["points"] for one in samples]),
            "instance_id": [one["instance_id"] for one in samples],
        }


def streamed(folder: Path, kind: type[RunnerBase] = RunnerIter, data: Any = None, **keys: Any) -> RunnerBase:
    torch.manual_seed(7)
    section = {"init_lr": 0.05, "batch_size_train": 2, "max_iters": 9, "log_freq": 1, "device": "cpu", "save_steps": 2}
    config = Config({"run": {"output_dir": str(folder), "shuffle_buffer": 3, **section, **keys}})
    return kind(config, SwapTask(), Swap(), data or {"points": {"train": Rows()}})


def seen(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, workers: int, batches: int) -> list[list[str]]:
    """The samples that each loader process of one process gives."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    run = lavis_run_config(Config({"run": {"batch_size_train": 1, "shuffle_buffer": 2}}), SwapTask)
    stream = StreamBatches(Rows(()), run, None, StreamState(workers))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers if workers > 1 else 0)
    found: dict[int, list[str]] = {}
    for number, (worker, _, _, batch) in enumerate(loader):
        if number == batches:
            break
        found.setdefault(worker, []).append(batch["instance_id"][0])
    return list(found.values())


def test_all_readers_together_give_each_row_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = seen(monkeypatch, 0, 1, 1, 22)[0]
    assert sorted(map(int, alone[:COUNT])) == sorted(map(int, alone[COUNT:])) == list(range(COUNT))
    assert alone[:COUNT] != alone[COUNT:], "each pass has an order of its own"
    assert seen(monkeypatch, 0, 1, 1, 22)[0] == alone
    shares = [*seen(monkeypatch, 0, 2, 2, 6), *seen(monkeypatch, 1, 2, 2, 5)]
    firsts = [row for share in shares for row in share]
    assert len(shares) == 4
    assert len(firsts) == len(set(firsts)) == COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, workers: int) -> None:
    """In the third pass, with a broken row in each; what was drawn before is read again and made into no samples."""
    streamed(tmp_path / "straight", num_workers=workers).train()
    broken = streamed(tmp_path / "broken", num_workers=workers)

    def interrupt(step: int, *_: Any) -> None:
        if step == 8:
            raise KeyboardInterrupt

    broken.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = streamed(tmp_path / "broken", num_workers=workers)
    again.train()
    assert same(tmp_path / "broken", tmp_path / "straight")
    assert lines(tmp_path / "broken" / "log.jsonl") == lines(tmp_path / "straight" / "log.jsonl")
    if workers == 0:
        rows: Any = again.dataset
        assert len(rows.made) == (9 - 6) * 2, "the checkpoint of step 6"


def test_another_number_of_readers_is_refused(tmp_path: Path) -> None:
    streamed(tmp_path, max_iters=2).train()
    with pytest.raises(ConfigError, match=r"by 1 processes with run\.num_workers 1, and now they are 1 with 2"):
        streamed(tmp_path, max_iters=4, num_workers=2).train()


def test_what_a_stream_cannot_do_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.points is a stream.*run\.runner=runner_iter, run\.max_iters"):
        streamed(tmp_path, RunnerBase)
    with pytest.raises(ConfigError, match=r"run\.group_by_length needs data that have a length"):
        streamed(tmp_path, group_by_length=True)
    two = {"a": {"train": Rows()}, "b": {"train": Rows()}}
    with pytest.raises(ConfigError, match=r"is trained on alone; leave datasets\.b out"):
        streamed(tmp_path, data=two)

    class Plain(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ConfigError, match=r"of the class Plain, .*rows\(reader, readers, seed\)"):
        streamed(tmp_path, data={"points": {"train": Plain()}})
    with pytest.raises(ConfigError, match=r"gives 'val' as a stream"):
        streamed(tmp_path, valid_splits=["val"], data={"points": {"train": Rows(), "val": Rows()}}).train()
    with pytest.raises(DataError, match=r"^Reader 0 of 1 found no sample in a whole pass"):
        streamed(tmp_path / "none", num_workers=1, data={"points": {"train": Rows(tuple(range(COUNT)))}}).train()


# -- conversations in tar shards


def shards(folder: Path, counts: tuple[int, ...] = (3, 2)) -> str:
    """Write shards of pictures of one colour with questions, and give their range."""
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for _ in range(count):
                color, value = list(tiny_lavis.COLORS.items())[number % 4]
                picture = io.BytesIO()
                Image.new("RGB", (20, 16), value).save(picture, "PNG")
                said = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": color}]}
                for name, content in (
                    (f"{number}.png", picture.getvalue()),
                    (f"{number}.json", json.dumps(said).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
                number += 1
    return str(folder / f"{{0..{len(counts) - 1}}}.tar")


def test_readers_of_shards_share_them_without_a_row_twice(tmp_path: Path) -> None:
    stream = ConversationStream(ann_paths=[shards(tmp_path)])
    for readers in (1, 2, 3):
        found = [[row[1] for row in stream.rows(reader, readers, "0-1")] for reader in range(readers)]
        every = [where for one in found for where in one]
        assert len(every) == len(set(every)) == 5, "whole shards, or every so many rows where they are too few"
    orders = {tuple(row[1] for row in stream.rows(0, 1, seed)) for seed in "0123456789"}
    assert len(orders) == 2, "of two shards"
    laion = LaionDataset(location=shards(tmp_path))
    assert isinstance(laion, RowStream)
    given = [row[0] for reader in range(3) for row in laion.rows(reader, 3, "0-1")]
    assert len(given) == len(set(given)) == 5
    torn = tmp_path / "0.tar"
    torn.write_bytes(torn.read_bytes()[:560])
    assert len(list(stream.rows(0, 1, "0"))) < 5
    assert stream.num_broken == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_is_shared_once_among_loader_processes(tmp_path: Path, workers: int) -> None:
    """The package `datasets` shares a stream out by itself inside a worker, which would lose rows."""
    pytest.importorskip("datasets.features")
    import pyarrow
    from pyarrow import parquet

    said = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]
    for part in range(3):
        table = pyarrow.table({"id": [f"{part}-{row}" for row in range(4)], "messages": said * 4})
        parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=3)
    stream = ConversationStream(ann_paths=[str(tmp_path)])
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    assert sorted(sample["id"] for sample in loader) == [f"{part}-{row}" for part in range(3) for row in range(4)]
    for readers in (1, 2, 4, 9):
        found = [row[1] for reader in range(readers) for row in stream.rows(reader, readers, "0-1")]
        assert len(found) == len(set(found)) == 12


def test_a_chat_model_learns_from_shards_and_is_scored_on_files(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from test_chat_learner import TINY, rows

    recipe = {
        "model": {"arch": "chat", "model_type": "default", **TINY["glm4v_9b"], "train": ["projector"]},
        "datasets": {
            "conversations": {
                "build_info": {
                    "streaming": True,
                    "annotations": {"train": {"storage": shards(tmp_path)}, "val": {"storage": rows(tmp_path, 2)}},
                }
            }
        },
        "run": {
            "task": "image_text_pretrain",
            "runner": "runner_iter",
            "max_iters": 6,
            "iters_per_inner_epoch": 3,
            "batch_size_train": 2,
            "init_lr": 1e-2,
            "log_freq": 1,
            "device": "cpu",
            "valid_splits": ["val"],
            "output_dir": str(tmp_path / "out"),
        },
    }
    train(open_recipe(tiny_lavis.write(tmp_path, recipe)))
    losses = [line["loss"] for line in lines(tmp_path / "out" / "log.jsonl")]
    assert losses[-1] < losses[0]
    assert [line["step"] for line in lines(tmp_path / "out" / "validations.jsonl")] == [3, 6]
