"""Annotation files, broken samples, batches: what every dataset shares."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_files
from PIL import Image
from torch.utils.data import DataLoader

from lavish.common.errors import DataError
from lavish.datasets.datasets.annotations import read_annotations
from lavish.datasets.datasets.base_dataset import MAX_WARNINGS, BaseDataset, ConcatDataset
from lavish.datasets.datasets.caption_datasets import CaptionDataset

ROWS = [{"image": "a.jpg", "caption": "one, two"}, {"image": "b.jpg", "caption": 'a "word"'}]


class Numbers(BaseDataset):
    """Rows of `value`; negative ones are broken."""

    def sample(self, index: int) -> dict[str, Any]:
        value = self.annotation[index]["value"]
        if value < 0:
            raise DataError(f"{value} is negative.")
        return {"x": torch.full((2,), float(value)), "id": self.annotation[index]["instance_id"]}


def numbers(tmp_path: Path, *values: int, max_broken: float = 0.0) -> Numbers:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rows.json").write_text(json.dumps([{"value": value} for value in values]))
    dataset = Numbers(ann_paths=[tmp_path / "rows.json"])
    dataset.max_broken = max_broken
    return dataset


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.json", json.dumps(ROWS)),
        ("rows.txt", json.dumps(ROWS)),
        ("rows.jsonl", "\n".join([json.dumps(ROWS[0]), "", json.dumps(ROWS[1])])),
        ("rows.csv", 'image,caption\na.jpg,"one, two"\nb.jpg,"a ""word"""\n'),
        ("rows.tsv", 'image\tcaption\na.jpg\tone, two\nb.jpg\t"a ""word"""\n'),
    ],
)
def test_formats(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert read_annotations(tmp_path / name) == ROWS


def test_an_object_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": {"x": 1}, "b": 2}')
    assert read_annotations(tmp_path / "rows.json") == [{"sample_id": "a", "x": 1}, {"sample_id": "b", "data": 2}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"", r"rows\.json: the file is empty"),
        ("rows.jsonl", b" \n", "the file is empty"),
        ("rows.json", b"{", r"rows\.json: no JSON: .*line 1"),
        ("rows.json", b"[1]", r"rows\.json, row 1: 1 where an object"),
        ("rows.json", b"3", "a list of objects"),
        ("rows.json", b"\xff\xfe\x00", "cannot be read as text"),
        ("rows.jsonl", b'{}\n{"a": \n', r"rows\.jsonl, row 2: no JSON"),
        ("rows.jsonl", b"{}\n[]\n", r"row 2: \[\] where an object"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", r"rows\.csv, row 3: has another number of columns than the head, a, b"),
        ("rows.csv", b"a,b\n1\n", r"row 2: has another number"),
        ("rows.csv", b'a,b\n1,"2"x\n', r"row 2: "),
        ("rows.json", b"[" * 100_000, "no JSON"),
        ("rows.json", b'[{"id": ' + b"9" * 5000 + b"}]", "no JSON: Exceeds the limit"),
        ("rows.jsonl", b"{}\n" + b"[" * 100_000, "row 2: no JSON"),
        ("rows.json", b"[]", r"rows\.json: holds no rows"),
        ("rows.json", b"{}", "holds no rows"),
        ("rows.csv", b"a,b\n", "holds no rows"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "row 1: two columns have one name; the head is a, b, a"),
        ("rows.csv", b'a,b\n"1\n2",3\n1\n', r"row 3: has another number"),
    ],
)
def test_files_that_are_wrong(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_annotations(tmp_path / name)


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json: no such file"):
        BaseDataset(ann_paths=[tmp_path / "rows.json"])


def test_instance_ids_run_over_all_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text('[{"value": 1}, {"value": 2}]')
    dataset = Numbers(ann_paths=[tmp_path / "a.json", tmp_path / "b.json"])
    assert [row["instance_id"] for row in dataset.annotation] == ["0", "1", "2", "3"]
    assert dataset.where(2) == f"{tmp_path / 'b.json'}, row 1"
    assert len(list(dataset)) == 4, "iteration ends"
    assert dataset[-1]["id"] == "3"
    with pytest.raises(IndexError):
        dataset[4]


def test_the_head_of_a_table_is_its_first_row(tmp_path: Path) -> None:
    """As `lavish data check` and a spreadsheet count."""
    (tmp_path / "rows.csv").write_text("value\n1\n2\n")
    (tmp_path / "rows.json").write_text('[{"value": 1}]')
    dataset = Numbers(ann_paths=[tmp_path / "rows.csv", tmp_path / "rows.json"])
    assert [dataset.where(at).rpartition("/")[2] for at in range(3)] == [
        "rows.csv, row 2",
        "rows.csv, row 3",
        "rows.json, row 1",
    ]


def test_the_first_broken_sample_raises_where_none_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json, row 2: -5 is negative\.$"):
        numbers(tmp_path, 1, -5, 3)[1]


def test_a_broken_sample_is_replaced_told_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = numbers(tmp_path, 1, -5, -6, 4, max_broken=0.5)
    with caplog.at_level(logging.WARNING):
        assert dataset[1]["id"] == "3", "the next good one"
    assert dataset.num_broken == 2
    assert caplog.messages == [
        f"{tmp_path / 'rows.json'}, row 2: -5 is negative. The next sample takes its place (1 broken so far).",
        f"{tmp_path / 'rows.json'}, row 3: -6 is negative. The next sample takes its place (2 broken so far).",
    ]
    assert dataset[2]["id"] == "3"
    assert dataset.num_broken == 2, "a sample counts once"
    assert ConcatDataset([dataset]).num_broken == 2


def test_many_broken_samples_are_told_one_by_one_at_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = numbers(tmp_path, *[-1] * (MAX_WARNINGS + 5), 1, max_broken=1)
    assert dataset[0]["id"] == str(MAX_WARNINGS + 5)
    assert (len(caplog.messages), dataset.num_broken) == (MAX_WARNINGS, MAX_WARNINGS + 5)


def test_a_photograph_stays_as_its_file_has_it(tmp_path: Path) -> None:
    """LAVIS does not turn it as its EXIF orientation asks."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (20, 16)).save(tmp_path / "a.jpg", exif=turned)
    assert BaseDataset(vis_root=tmp_path).picture("a.jpg").size == (20, 16)


def test_too_many_broken_samples_end_the_run(tmp_path: Path) -> None:
    dataset = numbers(tmp_path, 1, -5, -6, 4, max_broken=0.25)
    with pytest.raises(DataError, match=r"row 3: -6 is negative\. 2 of 4 samples are broken and 25\.0% may be"):
        dataset[1]


def test_none_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 samples can be read"):
        numbers(tmp_path, -1, -2, max_broken=1)[0]


def test_broken_samples_of_worker_processes_are_counted(tmp_path: Path) -> None:
    dataset = numbers(tmp_path, *[-1, 1, 2, 3] * 4, max_broken=0.5)
    loader = DataLoader(
        dataset, batch_size=4, collate_fn=dataset.collater, num_workers=2, multiprocessing_context="fork"
    )
    assert [batch["x"].shape for batch in loader] == [(4, 2)] * 4, "batches keep their size"
    assert dataset.num_broken == 4


def test_a_missing_picture_names_its_row(tmp_path: Path) -> None:
    rows = [{"image": f"{at}.png", "caption": "x", "image_id": at} for at in range(20)]
    zoo_files.write(tmp_path / "rows.json", rows)
    zoo_files.pictures(tmp_path, ("0.png",))
    dataset = CaptionDataset(vis_root=tmp_path, ann_paths=[tmp_path / "rows.json"])
    assert dataset[0]["image_id"] == 0
    with pytest.raises(DataError, match=r"rows\.json, row 17: .*16\.png"):
        dataset[16]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"imag": "0.png", "caption": "x"}, "the field 'image' is missing. Did you mean 'imag'"),
        ({"image": 3, "caption": "x"}, "3 where the name of a file is expected"),
        ({"image": "0.png", "caption": ["x"]}, "the field 'caption' is"),
        ({"image": "rows.json", "caption": "x"}, "row 1: .*rows.json"),
    ],
)
def test_rows_that_are_wrong(row: dict, message: str, tmp_path: Path) -> None:
    zoo_files.write(tmp_path / "rows.json", [{"image_id": 0, **row}])
    zoo_files.pictures(tmp_path, ("0.png",))
    with pytest.raises(DataError, match=message):
        CaptionDataset(vis_root=tmp_path, ann_paths=[tmp_path / "rows.json"])[0]


def test_a_caption_without_the_id_of_its_picture(tmp_path: Path) -> None:
    zoo_files.write(tmp_path / "rows.json", [{"image_id": 0}, {}])
    with pytest.raises(DataError, match=r"rows\.json, row 2: image_id is None; an id"):
        CaptionDataset(ann_paths=[tmp_path / "rows.json"])


def test_batches() -> None:
    dataset = BaseDataset()
    one, two = {"x": torch.zeros(2), "s": "a"}, {"x": torch.ones(2), "s": "b"}
    batch = dataset.collater([one, None, two])
    assert (batch["x"].shape, batch["s"]) == ((2, 2), ["a", "b"])
    with pytest.raises(DataError, match="None of the 2 samples"):
        dataset.collater([None, None])
    with pytest.raises(DataError, match=r"'x' of different shapes, \(2,\) and \(3,\)"):
        dataset.collater([one, {"x": torch.zeros(3), "s": "c"}])
    with pytest.raises(DataError, match="the field 's' is missing"):
        dataset.collater([one, {"x": torch.zeros(2)}])


def test_sets_that_are_trained_together(tmp_path: Path) -> None:
    first, second = numbers(tmp_path / "a", 1, 2), BaseDataset()
    both = ConcatDataset([first, second])
    samples = [{"x": torch.zeros(2), "id": "0"}, None, {"x": torch.ones(2), "other": 3}]
    assert list(both.collater(samples)) == ["x"]
    with pytest.raises(DataError, match="no key in common"):
        both.collater([{"x": 1}, {"y": 2}])


def test_a_dataset_of_ones_own_as_in_lavis() -> None:
    """`__getitem__` overridden, a None for a broken sample: the collater leaves it out."""

    class Own(BaseDataset):
        def __init__(self) -> None:
            super().__init__(vis_processor=str.upper, text_processor=None)
            self.annotation = [{"image": "a"}, {"image": None}]
            self._add_instance_ids("index")

        def __getitem__(self, index: int) -> Any:
            row = self.annotation[index]
            return None if row["image"] is None else {"image": self.vis_processor(row["image"]), "index": row["index"]}

    own = Own()
    assert own.collater([own[0], own[1]]) == {"image": ["A"], "index": ["0"]}
    set_processors: Callable = own.set_processors
    set_processors(None, None)
    assert own[0]["image"] == "a"


def test_a_class_without_samples_says_so() -> None:
    dataset = BaseDataset()
    dataset.annotation = [{}]
    with pytest.raises(NotImplementedError, match="BaseDataset does not say what a sample is"):
        dataset[0]
