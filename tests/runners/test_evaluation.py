"""`lavish evaluate` of LAVIS's recipes: what it leaves, over processes, after a kill, with any model."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluated_sets as sets
import pytest
import torch

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError, MediaError
from lavish.inference.load import POCKET
from lavish.models.blip.samples import BlipVQA
from lavish.runners import evaluation
from lavish.runners.evaluation_compare import compare_runs, largest_changes
from lavish.runners.evaluation_rows import Rows, line_of
from lavish.tasks.metrics import vqa
from lavish.tasks.scored_task import ScoredTask

RECIPES = {
    "caption_coco_eval": ("blip_caption", "coco_caption"),
    "nocaps_eval": ("blip_caption", "nocaps"),
    "vqav2_eval": ("blip_vqa", "coco_vqa"),
    "okvqa_eval": ("blip_vqa", "ok_vqa"),
    "aokvqa_eval": ("blip_vqa", "aok_vqa"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.fill(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _local(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVISH_CACHE", str(cache))
    monkeypatch.setenv("LAVISH_OFFLINE", "1")


def options(name: str, output: Path, *more: str) -> list[str]:
    checkpoint, dataset = RECIPES[name]
    return sets.tiny(checkpoint, output, *sets.sized(dataset), *more)


def run(name: str, output: Path, *more: str, **how: Any) -> dict[str, Any]:
    evaluation.evaluate(Config(sets.EVAL / f"{name}.yaml", options(name, output, *more)), **how)
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


# -- what a run gives


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = run(name, tmp_path, progress=lambda done, total: told.append((done, total)))
    num_splits = len(found["splits"])
    assert all(split["num_samples"] == 7 for split in found["splits"].values())
    assert len(rows(tmp_path)) == 7 * num_splits
    assert told[0] == (0, 7 * num_splits)
    assert told[-1] == (7 * num_splits, 7 * num_splits)
    record = found["record"]
    assert set(record["versions"]) >= {"lavish", "torch", "transformers"}
    assert len(record["config_sha256"]) == 64
    for split in found["splits"].values():
        for entry in split["metrics"].values():
            if "interval" in entry:
                assert entry["interval"][0] <= entry["value"] <= entry["interval"][1] or entry["value"] < 1e-9
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert left >= {"config.yaml", "results.jsonl", "metrics.json", "statistics.json", "report.html", "result"}
    assert not list(tmp_path.glob("*.part*"))


def test_two_data_sets_keep_their_results_apart(tmp_path: Path) -> None:
    """Their splits have one name, which is all that the names of LAVIS's files have."""
    second = "datasets.coco_caption.vis_processor.eval={name: blip_image_eval, image_size: 64}"
    found = run("nocaps_eval", tmp_path, second, "run.test_splits=[val]")["splits"]
    for name, ids in (("nocaps", list(range(7))), ("coco_caption", [42, 73, 74, 133, 139, 192, 544])):
        left = json.loads((tmp_path / "result" / name / "val_epochbest.json").read_text())
        assert [one["image_id"] for one in left] == ids
        assert found[f"{name}/val"]["num_samples"] == 7
    assert found["nocaps/val"]["notes"] == [
        "Not scored; result/nocaps_leaderboard_val.json is the file for its leaderboard."
    ]
    assert len(json.loads((tmp_path / "result" / "nocaps_leaderboard_val.json").read_text())) == 7


def test_streams_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavish.tasks.captioning import CaptionTask

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    monkeypatch.setattr(CaptionTask, "build_datasets", lambda self, cfg: {"coco_caption": {"test": Endless()}})
    with pytest.raises(ConfigError, match=r"the split 'test' is a stream.*streaming: false"):
        run("caption_coco_eval", tmp_path)


def test_captions(tmp_path: Path) -> None:
    """The task calls `blip_caption.generate` with what the recipe names; LAVIS's fails with a TypeError."""
    found = run("caption_coco_eval", tmp_path)["splits"]["coco_caption/test"]
    metrics = found["metrics"]
    assert set(metrics) >= {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "exact_match"}
    assert "METEOR" in metrics or any("METEOR" in note for note in found["notes"])
    assert found["agg_metrics"] == pytest.approx(metrics["CIDEr"]["value"] + metrics["Bleu_4"]["value"])
    assert metrics["Bleu_1"]["value"] > 0.01
    lavis = json.loads((tmp_path / "result" / "test_epochbest.json").read_text())
    assert [one["image_id"] for one in lavis] == [42, 73, 74, 133, 139, 192, 544]
    assert [one["caption"] for one in lavis] == [row["result"]["caption"] for row in rows(tmp_path)]
    assert "CIDEr" in json.loads((tmp_path / "evaluate.txt").read_text())["test"]


def test_caption_options_reach_the_model(tmp_path: Path) -> None:
    longer = ["run.num_beams=1", "run.max_len=12", "run.repetition_penalty=3.0"]
    run("caption_coco_eval", tmp_path / "a", "run.num_beams=1", "run.max_len=12")
    run("caption_coco_eval", tmp_path / "b", *longer)
    assert [row["result"] for row in rows(tmp_path / "a")] != [row["result"] for row in rows(tmp_path / "b")]


def test_questions(tmp_path: Path) -> None:
    """The official annotations count, by type of answer too."""
    found = run("vqav2_eval", tmp_path)["splits"]["coco_vqa/val"]
    given = rows(tmp_path)
    assert len({row["result"]["answer"] for row in given}) > 1
    scores = [100 * vqa.accuracy(row["result"]["answer"], row["reference"]) for row in given]
    assert [row["score"] for row in given] == pytest.approx(scores)
    assert found["metrics"]["vqa_accuracy"]["value"] == pytest.approx(sum(scores) / 7) == found["agg_metrics"]
    numbers = [score for at, score in enumerate(scores) if at % 3 == 0]
    assert found["groups"]["number"]["value"] == pytest.approx(sum(numbers) / len(numbers))
    assert given[3]["question"] == "What colour is thing 3?"
    assert json.loads((tmp_path / "result" / "val_vqa_result.json").read_text())[0]["question_id"] == 1000


def test_a_split_without_ground_truth_gets_the_file_of_its_leaderboard(tmp_path: Path) -> None:
    found = run("aokvqa_eval", tmp_path)["splits"]
    assert set(found["aok_vqa/val"]["metrics"]) == {"acc", "multiple_choice_acc"}
    assert found["aok_vqa/test"]["metrics"] == {}
    assert "result_leaderboard_test.json" in found["aok_vqa/test"]["notes"][0]
    board = json.loads((tmp_path / "result_leaderboard_test.json").read_text())
    assert set(board) == {str(1000 + at) for at in range(7)}
    for entry in board.values():
        assert entry["multiple_choice"] in sets.ANSWERS[:4]
        assert entry["direct_answer"] in sets.ANSWERS
    run("nocaps_eval", tmp_path / "nocaps")
    for split in ("val", "test"):
        board = json.loads((tmp_path / "nocaps" / f"result_leaderboard_{split}.json").read_text())
        assert [one["image_id"] for one in board] == list(range(7))
        assert set(board[0]) == {"image_id", "caption"}


def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    for size in (1, 3, 7):
        run("vqav2_eval", tmp_path / str(size), f"run.batch_size_eval={size}", "run.inference_method=generate")
    alone = [row["result"] for row in rows(tmp_path / "1")]
    assert [row["result"] for row in rows(tmp_path / "3")] == alone == [row["result"] for row in rows(tmp_path / "7")]


def test_report_stands_alone(tmp_path: Path) -> None:
    run("vqav2_eval", tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 7
    assert not re.search(r"(?:src|href)=(?!'data:image/jpeg)", page)
    assert "<script" not in page
    assert all(f"What colour is thing {at}?" in page for at in range(7))
    worst = [int(place) for place in re.findall(r"sample (\d+)<", page)]
    scores = {row["index"]: row["score"] for row in rows(tmp_path)}
    assert [scores[place] for place in worst] == sorted(scores.values())


def test_text_of_a_data_set_is_no_markup(cache: Path, tmp_path: Path) -> None:
    from lavish.runners.evaluation_report import _card

    row = {"index": 0, "result": {"answer": "<b>&"}, "question": "<script>", "reference": ["<i>"], "score": 1.0}
    card = _card(row, lambda row: None, ((0.0, 1.0), 1), "acc")
    assert "&lt;script&gt;" in card
    assert "&lt;b&gt;&amp;" in card
    assert "<i>" not in card.replace("<i style", "")


def test_what_a_report_shows_first() -> None:
    """Right and wrong apart, where there is nothing between; else the worst first, of losses the highest."""
    from lavish.runners.evaluation_report import _histogram, _limits, _sections

    def shown(scores: list[float], sign: int = 1) -> list[tuple[str, list[float]]]:
        rows = [{"index": at, "score": score} for at, score in enumerate(scores)]
        return [(title, [row["score"] for row in rows]) for title, rows in _sections(rows, sign)]

    assert shown([100, 0, 100]) == [("Wrong: 1 of 3", [0]), ("Right: 2 of 3", [100, 100])]
    assert shown([100, 100]) == [("Wrong: 0 of 2", []), ("Right: 2 of 2", [100, 100])]
    assert shown([0, 0]) == [("Worst cases", [0, 0]), ("From worse to better", [])]
    assert shown([30, 0, 100])[0] == ("Worst cases", [0, 30, 100])
    assert shown([1.5, 3.0], -1)[0] == ("Worst cases", [3.0, 1.5])
    assert _limits([{"score": 30.0}, {"score": 0.0}], 100) == (0, 100)
    assert _limits([{"score": 3.0}, {"score": -1.0}], 1) == (-1, 3)
    assert _histogram([1.0, 1.0], "x", 1) == "" == _histogram([1.0, float("nan"), 2.0], "x", 1)
    assert "<text x=0 y=84>0</text>" in _histogram([30.0, 60.0, 90.0], "x", 100)


def test_a_picture_that_is_gone_is_told_in_the_report(tmp_path: Path) -> None:
    from lavish.runners.evaluation_report import _picture

    def gone(row: Any) -> Any:
        raise MediaError("thing.jpg: no such file.")

    assert "thing.jpg: no such file." in _picture(gone, {})


# -- going on


def test_what_is_answered_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("vqav2_eval", tmp_path)
    whole = (tmp_path / "results.jsonl").read_bytes()

    def never(self: Any, *args: Any, **options: Any) -> Any:
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(BlipVQA, "from_config", never)
        second = run("vqav2_eval", tmp_path)
    assert second["splits"] == first["splits"]
    assert (tmp_path / "results.jsonl").read_bytes() == whole

    lines = whole.splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[:2]))
    (tmp_path / "results.part-00001-0a.jsonl").write_bytes(lines[5] + lines[3][:40])  # torn by the kill
    asked: list[str] = []
    answer = BlipVQA.predict_answers

    def noted(self: Any, samples: Any, **options: Any) -> Any:
        asked.extend(samples["text_input"])
        return answer(self, samples, **options)

    monkeypatch.setattr(BlipVQA, "predict_answers", noted)
    assert run("vqav2_eval", tmp_path)["splits"] == first["splits"]
    assert asked == [f"what colour is thing {at}?" for at in (2, 3, 4, 6)]
    assert (tmp_path / "results.jsonl").read_bytes() == whole


def test_answers_that_are_drawn_go_on_as_they_would_have(tmp_path: Path) -> None:
    """What is drawn depends on the sample, and not on what was asked before it."""
    drawn = ("run.use_nucleus_sampling=true", "run.top_p=0.95")
    run("caption_coco_eval", tmp_path, *drawn)
    whole = (tmp_path / "results.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[:4]))
    run("caption_coco_eval", tmp_path, *drawn)
    assert (tmp_path / "results.jsonl").read_bytes() == whole
    (tmp_path / "results.jsonl").write_bytes(whole + lines[0].replace(b'"index": 0', b'"index": 9'))
    with pytest.raises(DataError, match=r"has 7 samples; 0 have no result, and 1 results are of no sample"):
        run("caption_coco_eval", tmp_path, *drawn)


def test_a_damaged_file_is_no_torn_one(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"dataset": "a"\n{}\n')
    with pytest.raises(DataError, match=r"results\.jsonl, row 1: damaged.*delete the file"):
        Rows(tmp_path).read()


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run("vqav2_eval", tmp_path)
    run("vqav2_eval", tmp_path, "run.batch_size_eval=3", "run.num_workers=0")  # changes nothing that counts
    with pytest.raises(ConfigError, match=r"run\.num_ans_candidates: 128 -> 2.*--force"):
        run("vqav2_eval", tmp_path, "run.num_ans_candidates=2")
    run("vqav2_eval", tmp_path, "run.num_ans_candidates=2", force=True)
    assert len(rows(tmp_path)) == 7


def questions(path: Path, changes: dict[int, dict[str, Any]] | None = None) -> str:
    """Write rows of one's own, and give the change of the recipe that takes them, whose answers are written."""
    rows = [
        {"image": name, "question": f"What colour is thing {at}?", "question_id": at, "answer": "red"}
        for at, name in enumerate(sets.NAMES)
    ]
    for at, change in (changes or {}).items():
        rows[at] |= change
    path.write_text(json.dumps(rows))
    return f"datasets.coco_vqa.build_info.annotations.val={{storage: [{path}], url: null}}"


WRITTEN = "run.inference_method=generate"


def test_answers_of_other_data_or_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is the same, and what its file holds is not."""
    mine, out = tmp_path / "mine.json", tmp_path / "out"
    change = questions(mine)
    run("vqav2_eval", out, change, WRITTEN)
    questions(mine, {2: {"question": "Is it big?"}})
    with pytest.raises(
        ConfigError, match=r"answers of other data or weights: 1 changed since, first .*mine\.json.*--force"
    ):
        run("vqav2_eval", out, change, WRITTEN)
    with monkeypatch.context() as patch:
        patch.setattr(BlipVQA, "predict_answers", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("vqav2_eval", out, change, WRITTEN, force=True)
    left = {path.name for path in out.iterdir()}
    assert left >= {"config.yaml", "inputs.json"}
    assert not left & {"metrics.json", "results.jsonl", "report.html", "statistics.json", "evaluate.txt", "result"}
    run("vqav2_eval", out, change, WRITTEN)
    assert rows(out)[2]["question"] == "Is it big?"


def test_what_tells_one_file_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavish.runners import evaluation_inputs as inputs

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    first = inputs.mark_of(weights)
    weights.write_bytes(b"abd")
    assert inputs.mark_of(weights) != first
    monkeypatch.setattr(inputs, "MAX_READ_BYTES", 2)
    first = inputs.mark_of(weights)
    os.utime(weights, ns=(1, 1))
    assert inputs.mark_of(weights) != first
    (tmp_path / "report.html").touch()
    section = {
        "path": str(tmp_path),
        "dtype": "float32",
        "pieces": {"llm": str(weights)},
        "ask": {"vqa": {"text": "/"}},
    }
    found = inputs.inputs_of(Config({"model": section}), [("own", "val", [1, 2])])
    assert set(found) == {"own/val", str(weights)}
    assert found["own/val"] == "2 samples"


def test_a_run_that_failed_early_does_not_fix_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("[]")
    change = f"datasets.coco_vqa.build_info.annotations.val={{storage: [{tmp_path / 'empty.json'}], url: null}}"
    with pytest.raises(DataError, match=r"holds no rows|has no samples"):
        run("vqav2_eval", tmp_path / "out", change, WRITTEN)
    assert run("vqav2_eval", tmp_path / "out", questions(tmp_path / "mine.json"), WRITTEN)["splits"]


def test_odd_texts_and_ids_that_come_twice(tmp_path: Path) -> None:
    """Half a character is no UTF-8, and JSON can spell it; of two questions with one id the first counts, and it is
    said."""
    odd = {1: {"question_id": 0}, 3: {"answer": "\ud83d\u2028"}}
    found = run("vqav2_eval", tmp_path / "out", questions(tmp_path / "mine.json", odd), WRITTEN)["splits"][
        "coco_vqa/val"
    ]
    assert "1 of 7 results are not scored: their question_id is that of an earlier one." in found["notes"]
    assert found["metrics"]["vqa_accuracy"]["num_samples"] == 6
    given = rows(tmp_path / "out")
    assert given[3]["reference"] == ["\ud83d\u2028"]
    assert [at for at, row in enumerate(given) if "score" not in row] == [1]
    assert "Worst cases" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_folder_of_a_training_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_best.pth").touch()
    (tmp_path / "config.yaml").write_text("run: {task: vqa}\n")
    with pytest.raises(ConfigError, match=r"is the folder of a training.*evaluation"):
        run("vqav2_eval", tmp_path, force=True)
    assert (tmp_path / "config.yaml").read_text() == "run: {task: vqa}\n"


def test_a_full_disk_and_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered stays, and the same command goes on."""
    lines: list[str] = []

    def full(row: dict[str, Any]) -> str:
        if len(lines) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines.append(line_of(row))
        return lines[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "line_of", full)
        with pytest.raises(DataError, match=r"out: no room left \(.* MiB are free\)\. What is answered stays"):
            run("vqav2_eval", tmp_path / "out", questions(tmp_path / "mine.json"), WRITTEN)
    assert len(Rows(tmp_path / "out").read()) == 4
    run("vqav2_eval", tmp_path / "out", questions(tmp_path / "mine.json"), WRITTEN)
    assert len(rows(tmp_path / "out")) == 7
    with pytest.raises(ConfigError, match=r"mine\.json: this folder cannot be written \(File exists\); set another"):
        run("vqav2_eval", tmp_path / "mine.json")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with Rows(tmp_path).locked(), pytest.raises(ConfigError, match="another run is writing here"):
        run("vqav2_eval", tmp_path)


def program(processes: int, kill_rank: int, after: int, name: str, output: Path) -> subprocess.CompletedProcess[str]:
    """Run the evaluation in its own processes, one of which may kill itself."""
    environment = os.environ | {"PYTHONPATH": str(sets.ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += [str(Path(sets.__file__)), str(sets.EVAL / f"{name}.yaml"), str(kill_rank), str(after)]
    return subprocess.run(
        [*command, *options(name, output)], env=environment, capture_output=True, text=True, timeout=240
    )


def answered(output: str) -> list[int]:
    said = [json.loads(line) for line in output.splitlines() if line.startswith('{"rank"')]
    return sorted(index for one in said for index in one["answered"])


@pytest.mark.slow
def test_processes_share_the_samples_and_a_killed_one_is_made_good(tmp_path: Path) -> None:
    """Seven samples in batches of two on two processes, uneven shards: one is killed, and a second run goes on."""
    alone = run("vqav2_eval", tmp_path / "alone")
    killed = program(2, 1, 1, "vqav2_eval", tmp_path / "killed")
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "metrics.json").exists()
    before = [row["index"] for row in Rows(tmp_path / "killed").read()]
    assert 0 < len(before) < 7
    rest = program(2, -1, 0, "vqav2_eval", tmp_path / "killed")
    assert rest.returncode == 0, rest.stderr
    assert len(re.findall(r"vqa_accuracy +41\.43", rest.stdout)) == 1  # one process speaks
    assert rest.stderr.count("evaluate: 7 of 7") == 1
    assert sorted([*before, *answered(rest.stdout)]) == list(range(7))  # each once
    assert (tmp_path / "killed" / "results.jsonl").read_bytes() == (tmp_path / "alone" / "results.jsonl").read_bytes()
    found = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert found["splits"] == alone["splits"]
    assert found["record"]["processes"] == 2


# -- comparison


def test_compare(tmp_path: Path) -> None:
    run("vqav2_eval", tmp_path / "a")
    run("vqav2_eval", tmp_path / "b", "run.inference_method=generate")
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b")
    scores = [[row["score"] for row in rows(tmp_path / side)] for side in "ab"]
    assert (found.split, found.metric, found.num_samples) == ("coco_vqa/val", "vqa_accuracy", 7)
    assert found.difference.difference == pytest.approx(sum(scores[1]) / 7 - sum(scores[0]) / 7)
    assert found.num_better == sum(b > a for a, b in zip(*scores, strict=True))
    assert found.num_worse == sum(b < a for a, b in zip(*scores, strict=True))
    changes = largest_changes(tmp_path / "a", tmp_path / "b")
    gains = [second - first for first, second in zip(*scores, strict=True)]
    expected = sorted((at for at in range(7) if gains[at]), key=lambda at: (-abs(gains[at]), at))
    assert [one.index for one in changes] == expected != []
    answers = [[row["result"]["answer"] for row in rows(tmp_path / side)] for side in "ab"]
    assert all(one.answers == (answers[0][one.index], answers[1][one.index]) for one in changes)
    assert changes[0].question == f"What colour is thing {changes[0].index}?"
    assert largest_changes(tmp_path / "a", tmp_path / "a") == []
    (same,) = compare_runs(tmp_path / "a", tmp_path / "a")
    assert same.difference == (0.0, (0.0, 0.0), 1.0)


def test_of_losses_the_lower_one_is_better() -> None:
    from lavish.runners.evaluation_compare import _compare
    from lavish.tasks.metrics.measure import mean_of

    first, second = (mean_of(losses, higher_is_better=False) for losses in ([1.0, 2.0, 3.0], [0.5, 2.0, 1.0]))
    found = _compare("a/val", "loss", first, second)
    assert (found.num_better, found.num_worse, found.higher_is_better) == (2, 0, False)
    assert found.difference.difference == pytest.approx(-2.5 / 3)


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    run("vqav2_eval", tmp_path / "a")
    with pytest.raises(ConfigError, match="is no folder of a finished evaluation"):
        compare_runs(tmp_path / "a", tmp_path)
    run("okvqa_eval", tmp_path / "ok")
    with pytest.raises(ConfigError, match="no split in common"):
        compare_runs(tmp_path / "a", tmp_path / "ok")
    stored = json.loads((tmp_path / "a" / "statistics.json").read_text())
    stored["coco_vqa/val"]["samples"].pop()
    (tmp_path / "ok" / "statistics.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="of other samples"):
        compare_runs(tmp_path / "a", tmp_path / "ok")


# -- any model


def chat(output: Path, *more: str) -> Config:
    recipe = {
        "model": {"path": str(POCKET)},
        "datasets": {"coco_vqa": {"type": "eval", "vis_processor": {"eval": {"name": "blip_image_eval"}}}},
        "run": {
            "task": "vqa",
            "test_splits": ["val"],
            "batch_size_eval": 4,
            "device": "cpu",
            "output_dir": str(output),
        },
    }
    return Config(recipe, more)


def test_a_model_that_chats(tmp_path: Path) -> None:
    """It gets pictures as they are, and questions in the template that brings short answers."""
    evaluation.evaluate(chat(tmp_path / "a"))
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert found["record"]["asked"]["vqa"] == {"text": "{question}", "max_new_tokens": 16, "chat_template": "vqa"}
    answers = [row["result"]["answer"] for row in rows(tmp_path / "a")]
    assert all(answers)
    assert all(len(answer.split()) <= 3 for answer in answers)
    evaluation.evaluate(chat(tmp_path / "a"))  # asks nothing, and still knows how it was asked
    again = json.loads((tmp_path / "a" / "metrics.json").read_text())["record"]
    assert {name: again[name] for name in ("asked", "dtype")} == {
        name: found["record"][name] for name in ("asked", "dtype")
    }
    one_by_one = chat(tmp_path / "b", "run.batch_size_eval=1")
    evaluation.evaluate(one_by_one)
    assert [row["result"]["answer"] for row in rows(tmp_path / "b")] == answers


def test_how_a_model_is_asked_can_be_said(tmp_path: Path) -> None:
    evaluation.evaluate(chat(tmp_path / "a", "model.ask.vqa={text: 'Say it: {question}', max_new_tokens: 3}"))
    asked = json.loads((tmp_path / "a" / "metrics.json").read_text())["record"]["asked"]["vqa"]
    assert asked == {"text": "Say it: {question}", "max_new_tokens": 3, "chat_template": "vqa"}
    for wrong, message in (
        ("model.ask.vqq={text: '{question}'}", r"model\.ask\.vqq: no such kind\. Did you mean 'vqa'"),
        ("model.ask.vqa={txt: '{question}'}", r"model\.ask\.vqa\.txt: no such part"),
        ("model.ask.vqa={text: 'what'}", r"needs \{question\}"),
        ("model.dtyp=float32", r"dtyp.*Did you mean 'dtype'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluation.evaluate(chat(tmp_path / "b", wrong), force=True)


def test_a_path_of_blip_is_a_registered_model(tmp_path: Path) -> None:
    """What `lavish.load` opens and holds no conversation is asked as the registered model that it is."""
    checkpoint = sets.FIXTURES / "blip_vqa" / "open" / "checkpoint"
    fields = "{vision_config: {num_attention_heads: 4}, text_config: {num_attention_heads: 4}, max_txt_len: 10}"
    evaluation.evaluate(chat(tmp_path, f"model.path={checkpoint}", f"model.config={fields}"))
    run("vqav2_eval", tmp_path / "registered")
    assert [row["result"] for row in rows(tmp_path)] == [row["result"] for row in rows(tmp_path / "registered")]


# -- tasks and data of one's own


class Lengths(torch.utils.data.Dataset):
    """Five numbers, without the base class of LAVIS's sets."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"value": torch.tensor(float(index)), "name": f"n{index}"}

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"value": torch.stack([one["value"] for one in samples]), "name": [one["name"] for one in samples]}


def test_a_task_written_for_lavis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives plain numbers, fewer than samples, and its metrics by `after_evaluation`."""
    import numpy as np

    from lavish.common.registry import registry
    from lavish.tasks.base_task import BaseTask

    class Mean(BaseTask):
        @classmethod
        def setup_task(cls, cfg: Any, **kwargs: Any) -> "Mean":
            return cls()

        def build_model(self, cfg: Any) -> torch.nn.Module:
            return torch.nn.Linear(1, 1)

        def build_datasets(self, cfg: Any) -> dict[str, Any]:
            return {"coco_caption": {"test": Lengths()}}

        def valid_step(self, model: Any, samples: Any) -> list[float]:
            return [samples["value"].mean().item()]

        def after_evaluation(self, val_result: Any, split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float]:
            path = self.save_result(val_result, registry.get_path("result_dir"), f"{split_name}_{epoch}")
            return {"agg_metrics": float(np.mean(json.loads(Path(path).read_text())))}

    monkeypatch.setitem(registry._kinds["task"].entries, "mean_of_mine", Mean)
    found = run("caption_coco_eval", tmp_path, "run.task=mean_of_mine")["splits"]["coco_caption/test"]
    assert found["agg_metrics"] == pytest.approx((0.5 + 2.5 + 4) / 3)
    assert found["num_samples"] == 5
    assert rows(tmp_path)[0]["indices"] == [0, 1]
    assert (tmp_path / "result" / "test_best.json").is_file()


# -- wrong recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.test_splits=[]", "names no split to evaluate"),
        ("run.test_splits=[tset]", r"no split 'tset' \(run\.test_splits\)"),
        ("run.tast=vqa", r"run\.tast.*unknown key.*Did you mean 'task'"),
        ("run.task=vqaa", "No task is named 'vqaa'. Did you mean 'vqa'"),
        ("run.inference_method=genearte", "'genearte'.* generate | rank"),
        ("datasets.coco_vqaa={}", "No builder is named 'coco_vqaa'"),
        ("datasets.coco_vqa.vis_processor.eval.nme=3", "nme"),
        ("datasets.coco_vqa.build_info.annotations.val.storage=[/none.json]", "none.json|pair"),
        ("model.arch=blip_vqaa", "No model is named 'blip_vqaa'"),
        ("run.device=cudaa", "cudaa"),
        ("run.annotation_file={val: /none.json}", r"/none\.json: no such file of ground truth .*split 'val'"),
    ],
)
def test_wrong_recipes_are_told_before_anything_heavy(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(BlipVQA, "from_config", never)
    with pytest.raises((ConfigError, DataError), match=message):
        run("vqav2_eval", tmp_path / "out", change)
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_picture_that_is_absent_names_its_row(tmp_path: Path, cache: Path) -> None:
    records = json.loads((cache / "coco" / "annotations" / "vqa_val_eval.json").read_text())
    records[4]["image"] = "val2014/absent.jpg"
    (tmp_path / "rows.json").write_text(json.dumps(records))
    storage = [str(tmp_path / "rows.json"), *["null"] * 0]
    files = Config(sets.EVAL / "vqav2_eval.yaml").datasets_cfg.coco_vqa.build_info.annotations.val.storage[1:]
    change = f"datasets.coco_vqa.build_info.annotations.val={{storage: [{', '.join([*storage, *files])}], url: null}}"
    with pytest.raises((DataError, MediaError), match=r"rows\.json, row 5.*absent\.jpg"):
        run("vqav2_eval", tmp_path / "out", change)
    assert len(Rows(tmp_path / "out").read()) == 4  # what was answered stays


def test_references_of_half_a_split(tmp_path: Path, cache: Path) -> None:
    stored = json.loads((cache / "coco" / "annotations" / "v2_mscoco_val2014_annotations.json").read_text())
    stored["annotations"].pop()
    (tmp_path / "half.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="1 of 7 questions have no right answer, first 1006"):
        run("vqav2_eval", tmp_path / "out", f"run.annotation_file={tmp_path / 'half.json'}")


def test_ground_truth_of_a_file(tmp_path: Path) -> None:
    """Captions in COCO's form, as LAVIS's recipes name them in `run.annotation_file`."""
    truth = [{"image_id": int(name[-16:-4]), "caption": "left of left", "id": at} for at, name in enumerate(sets.NAMES)]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": [], "annotations": truth}))
    found = run("caption_coco_eval", tmp_path / "a", f"run.annotation_file={path}")
    assert all(row["reference"] == ["left of left"] for row in rows(tmp_path / "a"))
    assert found["splits"]["coco_caption/test"]["metrics"]["ROUGE_L"]["value"] > 0
    asked = (tmp_path / "a" / "model.json").stat().st_mtime_ns
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"annotations": [{**one, "caption": "a man"} for one in truth]}))
    again = run("caption_coco_eval", tmp_path / "a", f"run.annotation_file={other}")  # scored anew, not asked
    assert all(row["reference"] == ["a man"] for row in rows(tmp_path / "a"))
    assert (tmp_path / "a" / "model.json").stat().st_mtime_ns == asked
    assert again["record"]["config_sha256"] != found["record"]["config_sha256"]
    by_split = f"run.annotation_file={{test: {path}}}"
    assert run("caption_coco_eval", tmp_path / "b", by_split)["splits"] == found["splits"]
    path.write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"no captions in COCO's form"):
        run("caption_coco_eval", tmp_path / "c", f"run.annotation_file={path}")


def test_every_built_in_task_of_results_says_how_they_are_merged() -> None:
    from lavish.common.registry import registry

    for name in registry.list_tasks():
        cls = registry.get_task_class(name)
        assert cls.scores_loaded_models or issubclass(cls, ScoredTask)


# -- recipes of models that chat


def test_boxes_by_a_model_that_chats(tmp_path: Path, cache: Path) -> None:
    """The recipe of CogVLM's grounding model, on the pocket model and rows of one's own."""
    rows_file = tmp_path / "boxes.json"
    found = [
        {"image": name, "expression": "the circle", "bbox": [5 * at, 8, 30, 32]} for at, name in enumerate(sets.NAMES)
    ]
    rows_file.write_text(json.dumps([{**one, "width": 70 + 9 * at, "height": 64} for at, one in enumerate(found)]))
    options = [
        f"model={{path: {POCKET}, tokenizer: null}}",
        f"datasets.refcoco.build_info.annotations.val.storage={rows_file}",
        f"datasets.refcoco.build_info.images.storage={cache / 'coco' / 'images'}",
        "run.num_workers=0",
        "run.device=cpu",
        f"run.output_dir={tmp_path / 'out'}",
    ]
    result = evaluation.evaluate(Config(sets.ROOT / "projects" / "cogvlm" / "eval" / "refcoco_eval.yaml", options))
    metrics = result.splits[0].metrics
    assert metrics is not None
    assert metrics["readable"] > 50  # the pocket model answers with boxes
    given = rows(tmp_path / "out")
    assert [row["score"] for row in given] == pytest.approx(result.splits[0].scores.measures["mean_iou"].per_sample)
    assert given[0]["reference"] == "[[000,125,429,625]]"
    assert given[0]["question"] == "the circle"
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/jpeg;base64,") == 7


def test_the_recipe_of_a_model_that_chats(tmp_path: Path) -> None:
    options = [
        "model.path=null",
        "run.num_workers=0",
        "run.device=cpu",
        f"run.output_dir={tmp_path}",
    ]  # the pocket model
    evaluation.evaluate(Config(sets.ROOT / "projects" / "cogvlm2" / "eval" / "vqav2_eval.yaml", options))
    assert json.loads((tmp_path / "metrics.json").read_text())["record"]["asked"]["vqa"]["chat_template"] == "vqa"


def test_recipes_of_choices(tmp_path: Path) -> None:
    """A-OKVQA's choices, by the recipe; and MMBench's recipe asks for its file."""
    folder = sets.ROOT / "projects" / "cogvlm2" / "eval"
    options = ["model.path=null", "run.num_workers=0", "run.device=cpu", f"run.output_dir={tmp_path}"]
    (split,) = evaluation.evaluate(Config(folder / "aokvqa_eval.yaml", options)).splits
    assert split.metrics is not None
    assert split.metrics["chance"] == 25
    assert [row["result"]["right_choice"] for row in split.rows] == ["ABCD"[at % 4] for at in range(7)]
    with pytest.raises(ConfigError, match=r"names no file|has no split"):
        evaluation.check(Config(folder / "mmbench_eval.yaml", options))
    rows_file = tmp_path / "rows.tsv"
    rows_file.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tA\ta.png\n")
    storage = f"datasets.questions.build_info.annotations.val.storage={rows_file}"
    assert evaluation.check(Config(folder / "mmbench_eval.yaml", [*options, storage]))


def test_a_recipe_of_blip_with_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`model.path` on the command line puts any model into it."""
    more = ("run.num_workers=0", "run.device=cpu", f"run.output_dir={tmp_path}")
    evaluation.evaluate(Config(sets.EVAL / "vqav2_eval.yaml", [f"model.path={POCKET}", *more]))
    assert "model.arch 'blip_vqa' of the recipe is not" in caplog.text
    assert (
        "run.inference_method, run.num_ans_candidates, run.num_beams, run.min_len of the recipe do not" in caplog.text
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["record"]["asked"]["vqa"]["chat_template"] == "vqa"


def test_retrieval(tmp_path: Path) -> None:
    options = sets.tiny("blip_feature_extractor", tmp_path, *sets.sized("coco_retrieval", "run.k_test=3"))
    result = evaluation.evaluate(Config(sets.EVAL / "ret_coco_eval.yaml", options)).splits[0]
    found = json.loads((tmp_path / "metrics.json").read_text())["splits"]["coco_retrieval/test"]
    assert found["num_samples"] == 7
    assert set(found["metrics"]) == {
        *(f"{kind}_r{depth}" for kind in ("txt", "img") for depth in (1, 5, 10)),
        *("txt_r_mean", "img_r_mean", "r_mean"),
    }
    assert found["metrics"]["txt_r10"]["num_samples"] == 7
    assert found["metrics"]["img_r10"]["num_samples"] == 12  # captions
    assert found["agg_metrics"] == pytest.approx(found["metrics"]["txt_r_mean"]["value"])
    again = tmp_path / "again"
    evaluation.evaluate(Config(sets.EVAL / "ret_coco_eval.yaml", [*options, f"run.output_dir={again}"]))
    assert len(compare_runs(tmp_path, again)) == 6
    assert result.metrics is not None


def test_dialogues(tmp_path: Path, cache: Path) -> None:
    fixture = sets.FIXTURES / "gpt_dialogue" / "open"
    sets.write(
        cache / "avsd" / "annotations" / "test.json", json.loads((fixture / "inputs/annotations.json").read_text())
    )
    checkpoint = fixture / "checkpoint"
    options = [
        f"model.finetuned={checkpoint / 'checkpoint_best.pth'}",
        f"model.tokenizer={checkpoint / 'gpt2'}",
        *(f"datasets.avsd_dialogue.{kind}_processor.eval.tokenizer={checkpoint / 'gpt2'}" for kind in ("vis", "text")),
        f"datasets.avsd_dialogue.build_info.features.storage={fixture / 'inputs' / 'features'}",
        "run.max_len=4",
        "run.min_len=1",
        "run.num_beams=2",
        "run.device=cpu",
    ]
    recipe = sets.ROOT / "projects" / "gpt_dialogue" / "eval" / "dialogue_avsd_eval.yaml"
    found = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        evaluation.evaluate(Config(recipe, [*options, f"run.batch_size_eval={size}", f"run.output_dir={folder}"]))
        found[size] = json.loads((folder / "metrics.json").read_text())["splits"]["avsd_dialogue/test"]
    assert found[1]["higher_is_better"] is False
    assert set(found[1]["metrics"]) >= {"loss", "perplexity", "Bleu_1", "CIDEr"}
    for name, entry in found[1]["metrics"].items():
        assert found[2]["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-5), name
    (row, *_) = rows(tmp_path / "1")
    assert row["score"] == pytest.approx(row["result"]["loss"])
    assert isinstance(row["result"]["answer"], str)
