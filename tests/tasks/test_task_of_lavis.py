"""A task as a LAVIS user wrote it, with the import's first word replaced: it runs in the evaluation of a recipe."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import evaluated_sets as sets
import pytest
import torch

from lavish.common.config import Config
from lavish.common.dist_utils import (
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    main_process,
)
from lavish.common.registry import registry
from lavish.datasets.data_utils import prepare_sample
from lavish.runners import evaluation
from lavish.tasks.base_task import BaseTask


class WordsTask(BaseTask):
    """Counts words of captions; its methods are those of LAVIS's tutorials."""

    def __init__(self, num_beams: int, max_len: int, report_metric: bool = True) -> None:
        super().__init__()
        self.num_beams, self.max_len, self.report_metric = num_beams, max_len, report_metric

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> "WordsTask":
        run_cfg = cfg.run_cfg
        return cls(run_cfg.num_beams, run_cfg.max_len, run_cfg.get("report_metric", True))

    def valid_step(self, model: Any, samples: Any) -> list[dict[str, Any]]:
        samples = prepare_sample(samples, cuda_enabled=torch.cuda.is_available())
        captions = model.generate(
            samples, use_nucleus_sampling=False, num_beams=self.num_beams, max_length=self.max_len
        )
        pairs = zip(captions, samples["image_id"], strict=True)
        return [{"caption": caption, "image_id": int(image_id)} for caption, image_id in pairs]

    def after_evaluation(self, val_result: Any, split_name: str, epoch: Any, **kwargs: Any) -> Any:
        path = self.save_result(
            result=val_result,
            result_dir=registry.get_path("result_dir"),
            filename=f"{split_name}_epoch{epoch}",
            remove_duplicate="image_id",
        )
        return self._report_metrics(path, split_name) if self.report_metric else {"agg_metrics": 0.0}

    @main_process
    def _report_metrics(self, eval_result_file: str, split_name: str) -> dict[str, float]:
        results = json.loads(Path(eval_result_file).read_text())
        words = sum(len(one["caption"].split()) for one in results) / len(results)
        with open(os.path.join(registry.get_path("output_dir"), "evaluate.txt"), "a") as file:
            file.write(json.dumps({split_name: words}) + "\n")
        logging.info(words)
        return {"agg_metrics": words, "words": words}


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVISH_CACHE", str(sets.fill(tmp_path / "cache")))
    monkeypatch.setenv("LAVISH_OFFLINE", "1")
    monkeypatch.setitem(registry._kinds["task"].entries, "words", WordsTask)
    options = sets.tiny(
        "blip_caption", tmp_path / "out", *sets.sized("coco_caption", "run.task=words", "run.num_beams=1")
    )
    result = evaluation.evaluate(Config(sets.EVAL / "caption_coco_eval.yaml", options)).splits[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    words = sum(len(row["result"]["caption"].split()) for row in rows) / 7
    assert result.metrics == pytest.approx({"agg_metrics": words, "words": words})
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["splits"]["coco_caption/test"]
    assert found["metrics"]["words"] == {"value": pytest.approx(words)}
    assert json.loads((tmp_path / "out" / "evaluate.txt").read_text()) == {"test": pytest.approx(words)}
    assert (tmp_path / "out" / "report.html").read_text().count("<div class=card>") == 7


def test_names_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (get_rank(), get_world_size(), is_main_process(), is_dist_avail_and_initialized()) == (0, 1, True, False)
    assert main_process(lambda value: value)(3) == 3
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_process(lambda value: value)(3) is None


def test_batches_stay_where_there_is_no_gpu() -> None:
    samples = {"image": torch.ones(1), "text_input": ["a"], "parts": [torch.ones(2)]}
    assert prepare_sample(samples, cuda_enabled=False) is samples
