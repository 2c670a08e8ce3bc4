"""The tasks one by one: steps on real models, merging, and the faults of LAVIS's that ours must not have."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tolerance import GPT_DIALOGUE_LOSS, ROUNDING
from warm import run_together

from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.formats.choices import put
from lavish.inference.load import POCKET, load
from lavish.models.blip.samples import BlipFeatureExtractor, BlipVQA
from lavish.models.gpt_dialogue.samples import GPTDialogue
from lavish.tasks import setup_task
from lavish.tasks.base_task import BaseTask, read_losses, to_device
from lavish.tasks.captioning import number
from lavish.tasks.chat_model import ChatModel, first_line
from lavish.tasks.dialogue import DialogueTask, rows_of
from lavish.tasks.grounding import GroundingTask, target_of
from lavish.tasks.multimodal_classification import MultimodalClassificationTask
from lavish.tasks.results import first_of_each, save_result
from lavish.tasks.retrieval import RetrievalTask
from lavish.tasks.vqa import AOKVQATask, GQATask, OCRVQATask, VQATask, by_type

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
HEADS = {"vision_config": {"num_attention_heads": 4}, "text_config": {"num_attention_heads": 4}, "max_txt_len": 10}


def blip(cls: Any, name: str) -> Any:
    return cls.from_pretrained(checkpoint=FIXTURES / name / "open" / "checkpoint", config=HEADS).eval()


def pictures(count: int, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# -- the base


def test_a_train_step_of_lavis_and_of_others() -> None:
    loss, part = torch.tensor(2.0), torch.tensor(1.0)
    step = BaseTask().train_step(lambda samples: {"loss": loss, "loss_lm": part, "logits": part}, {})  # type: ignore[arg-type]
    assert step == (loss, {"loss": loss, "loss_lm": part})
    assert read_losses(step) == {"loss": loss, "loss_lm": part}
    assert read_losses(loss) == {"loss": loss}
    assert read_losses({"loss": loss, "share": part}) == {"loss": loss, "share": part}


def test_setup_task_by_the_recipe() -> None:
    cfg = SimpleNamespace(run_cfg={"task": "gqa", "inference_method": "generate"})
    task = setup_task(cfg)
    assert isinstance(task, GQATask)
    assert task.inference_method == "generate"
    with pytest.raises(ConfigError, match=r"no run\.task"):
        setup_task(SimpleNamespace(run_cfg={}))


def test_direction_of_each_task() -> None:
    """A loss is better when lower; LAVIS takes the highest one for the best checkpoint."""
    lower = {name for name in registry.list_tasks() if not registry.get_task_class(name).higher_is_better}
    assert lower == {"deepspeed_image_text_pretrain", "dialogue", "image_text_pretrain"}


def test_what_a_task_does_not_say() -> None:
    with pytest.raises(NotImplementedError, match=r"override valid_step"):
        BaseTask().valid_step(torch.nn.Linear(1, 1), {})
    assert BaseTask().after_evaluation(val_result=[], split_name="val", epoch=1) is None


def test_batches_go_to_a_device_whole() -> None:
    moved = to_device({"a": torch.ones(1), "b": [torch.ones(1), "text"], "c": None}, "meta")
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1:] == ["text"]
    assert moved["c"] is None


def test_models_are_told_what_they_are_trained_and_evaluated_on() -> None:
    heard: list[Any] = []
    model = SimpleNamespace(before_evaluation=lambda dataset, task_type: heard.append((dataset, task_type)))
    BaseTask().before_evaluation(model=model, dataset=[1])  # type: ignore[arg-type]
    BaseTask().before_training(model=model, dataset=[1])  # type: ignore[arg-type]
    assert heard == [([1], BaseTask)]


# -- results


def test_each_result_once(tmp_path: Path) -> None:
    given = [{"id": 1, "a": "x"}, {"id": 2}, {"id": 1, "a": "y"}]
    assert first_of_each(given, "id") == given[:2]
    path = BaseTask.save_result(given, tmp_path / "deep", "val_1", remove_duplicate="id")
    assert json.loads(Path(path).read_text()) == given[:2]
    assert json.loads(Path(save_result(given, tmp_path, "all")).read_text()) == given
    with pytest.raises(DataError, match="has no 'question_id'"):
        first_of_each(given, "question_id")


PROGRAM = """
import json, sys
import torch
from lavish.common import dist
from lavish.tasks.dialogue import DialogueTask
from lavish.tasks.vqa import GQATask
dist.start("cpu")
rank = dist.rank()
losses = [[(0, 1.0), (1, 2.0), (2, 6.0)], [(3, 3.0), (2, 6.0)]][rank]  # uneven, and one sample twice
task = DialogueTask({})
found = task.after_evaluation([{"instance_id": str(i), "loss": x, "num_samples": 1} for i, x in losses], "val", 0)
answers = [[("a", "dog"), ("b", "cat")], [("b", "cat"), ("c", "dog")]][rank]
vqa = GQATask({"inference_method": "generate"})
scored = vqa.after_evaluation([{"question_id": i, "answer": x, "reference": "dog"} for i, x in answers], "val", 0)
from test_tasks import Pairs, retrieve
ranked = retrieve(range(3)[rank::2])
try:
    dist.on_main(lambda: 1 / 0)
except ZeroDivisionError:
    raised = True
print(json.dumps([rank, found, scored, raised, dist.gather(rank), ranked]) + "\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """LAVIS reports the mean of each process's own losses."""
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).resolve().parents[2]
    places = (root / "src", root / "tests", root / "tests" / "tasks")
    environment = {"PYTHONPATH": os.pathsep.join(map(str, places)), "CUDA_VISIBLE_DEVICES": ""}
    found = run_together(2, tmp_path / "program.py", Path(__file__).parent, environment=environment)
    assert found.returncode == 0, found.stderr
    rows = sorted(json.loads(line) for line in found.stdout.splitlines())
    alone = retrieve(range(3))
    for rank, losses, scored, raised, gathered, ranked in rows:
        assert ranked == pytest.approx(alone)
        assert losses["agg_metrics"] == pytest.approx(3.0)
        assert scored["acc"] == pytest.approx(100 * 2 / 3)
        assert raised
        assert gathered == [0, 1]
        assert rank in gathered


# -- questions


def test_gqa_from_its_samples() -> None:
    model = blip(BlipVQA, "blip_vqa")
    task = GQATask({"inference_method": "rank"})
    task.answer_list = ["red", "green", "old"]
    samples = {"image": pictures(2), "text_input": ["what", "where is"], "question_id": torch.tensor([7, 8])}
    results = task.valid_step(model, {**samples, "answer": ["red", None]})
    assert [set(one) for one in results] == [{"question_id", "answer", "reference"}, {"question_id", "answer"}]
    assert [one["question_id"] for one in results] == [7, 8]
    right = [{**one, "reference": one["answer"]} for one in results]
    scores = task.score(right, None, "val")
    assert scores is not None
    assert scores.agg_metrics == 100.0
    assert task.score([{"question_id": 7, "answer": "red"}], None, "test") is None
    assert task.leaderboard(results)[0] == {"questionId": "7", "prediction": results[0]["answer"]}


def test_a_model_that_cannot_do_what_a_task_asks() -> None:
    samples = {"image": pictures(1), "text_input": ["what"], "question_id": [1]}
    with pytest.raises(ConfigError, match=r"Classifier has no predict_answers\(samples\).*model\.path"):
        GQATask({}).valid_step(Classifier(), samples)


def test_ranking_without_answers_says_so() -> None:
    samples = {"image": pictures(1), "text_input": ["what"], "question_id": [1]}
    with pytest.raises(ConfigError, match="inference_method='rank' chooses among answers"):
        GQATask({}).valid_step(blip(BlipVQA, "blip_vqa"), samples)


def test_aokvqa_choices_are_ranked_for_each_question() -> None:
    model = blip(BlipVQA, "blip_vqa")
    task = AOKVQATask({})
    task.answer_list = ["red", "green", "old"]
    choices = [["red", "green"], ["old", "man"]]
    samples = {"image": pictures(2), "text_input": ["what", "where"], "question_id": ["a", "b"], "choices": choices}
    found = task.valid_step(model, {**samples, "correct_choice_idx": [0, 1], "direct_answers": [["red"], ["old"]]})
    for at, result in enumerate(found):
        assert result["choice"] in choices[at]
        row = {"image": samples["image"][at : at + 1], "text_input": [samples["text_input"][at]]}
        assert model.predict_answers(row, answer_list=choices[at], num_ans_candidates=2) == [result["choice"]]


def test_read_text() -> None:
    given = [("Coca Cola", ["coca cola"]), ("stpo", ["stop"]), ("x", ["stop"])]
    results = [{"question_id": at, "answer": text, "reference": refs} for at, (text, refs) in enumerate(given)]
    scores = OCRVQATask({}).score(results, None, "val")
    assert scores is not None
    assert scores.metrics() == pytest.approx({"ANLS": 1.5 / 3, "exact_match": 1 / 3, "agg_metrics": 0.5})


def test_questions_with_one_right_answer() -> None:
    """The official score asks for three other annotators: of one's own rows with one answer it makes 0 of all."""
    given = [
        ("Red.", "red"),
        ("the 2", "Two"),
        ("blue", "red"),
        ("", "red"),
        ("teal", ["blue", {"answer": "Teal"}]),
        ("3", 3),
        ("red", ["red", "blue", "blue"]),
    ]
    results = [{"question_id": at, "answer": text, "reference": refs} for at, (text, refs) in enumerate(given)]
    scores = VQATask({}).score(results, None, "val")
    assert scores is not None
    assert (scores.measures["vqa_accuracy"].per_sample == [100, 100, 0, 0, 100, 100, 100]).all()
    assert scores.notes == ["All questions have fewer than 4 answers; there any one of them is right."]
    results[0]["reference"] = ["red", "red", "blue", "blue"]
    scores = VQATask({}).score(results, None, "val")
    assert scores is not None
    assert scores.measures["vqa_accuracy"].per_sample[0] == pytest.approx(50)
    assert scores.notes[0].startswith("6 of 7 questions")
    with pytest.raises(DataError, match=r"Question 0: the right answer is .*a text or a list"):
        VQATask({}).score([{**results[0], "reference": {"a": 1}}], None, "val")


def test_scores_by_type_of_answer() -> None:
    results = [{"question_id": at} for at in range(4)]
    official = {0: {"answer_type": "number"}, 1: {"answer_type": "other"}, 2: {"answer_type": "number"}, 3: {}}
    found = by_type(results, [1.0, 0.25, 0.0, 1.0], official)
    assert {kind: (measure.value, len(measure.stats)) for kind, measure in found.items()} == {
        "number": (50.0, 2),
        "other": (25.0, 1),
    }


def test_ids_of_pictures_in_digits_are_numbers() -> None:
    """COCO's file of captions has numbers, LAVIS's samples have texts of digits."""
    assert [number(one) for one in ("000123", 5, "12a", "a.png", None)] == [123, 5, "12a", "a.png", None]


def test_gqa_of_a_model_that_writes() -> None:
    """No recipe says how a model that chats answers; what is no word of the list was written."""
    task = GQATask({})
    task.answer_list = ["yes", "a dog"]
    assert [task.score_one(text, ["yes"]) for text in ("Yes.", "yes", "a dog")] == [1, 1, 0]
    assert task.score_one("a dog", ["dog"]) == 0  # chosen from the list, and compared as it is
    assert GQATask({}).score_one("The dog", ["dog"]) == 1


# -- classes, losses


class Classifier(torch.nn.Module):
    def predict(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"predictions": samples["logits"], "targets": samples["label"]}


def test_classification() -> None:
    task = MultimodalClassificationTask({})
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    samples = {"logits": logits, "label": torch.tensor([1, 0, 0]), "instance_id": ["0", "1", "2"]}
    results = task.valid_step(Classifier(), samples)
    assert results[2] == {"instance_id": "2", "prediction": 1, "target": 0}
    found = task.after_evaluation(val_result=[*results, results[0]], split_name="val", epoch=0)
    assert found == pytest.approx({"acc": 2 / 3, "agg_metrics": 2 / 3})
    hidden = [{**one, "target": -1} for one in results]
    assert task.score(hidden, None, "test") is None
    with pytest.raises(DataError, match="1 of 3 samples have no right class, first '0'"):
        task.score([hidden[0], *results[1:]], None, "val")
    with pytest.raises(DataError, match="3 predictions and 2 targets"):
        task.valid_step(Classifier(), {**samples, "label": torch.tensor([1, 0])})


@pytest.fixture(scope="module")
def dialogue() -> tuple[GPTDialogue, dict[str, torch.Tensor]]:
    folder = FIXTURES / "gpt_dialogue" / "open"
    model = GPTDialogue.from_pretrained(checkpoint=folder / "checkpoint" / "checkpoint_best.pth").eval()
    dialogs = json.loads((folder / "inputs" / "annotations.json").read_text())["dialogs"]
    turns = [{**one, "dialog": one["dialog"][:-1], **one["dialog"][-1]} for one in dialogs]
    samples = [model.processor.sample(turn, features=folder / "inputs" / "features") for turn in turns]
    return model, model.processor.collate(samples)


@torch.no_grad()
def test_losses_do_not_depend_on_the_batch(dialogue: tuple[GPTDialogue, dict[str, torch.Tensor]]) -> None:
    model, batch = dialogue
    task = DialogueTask({})
    together = task.valid_step(model, batch)
    assert len(together) == len(batch["input_ids"]) > 1
    for result, row in zip(together, rows_of(batch), strict=True):
        assert result["loss"] == pytest.approx(float(model(row)["loss"]), abs=GPT_DIALOGUE_LOSS["atol"])
        assert result["num_tokens"] == int(((row["labels"] != -1) & (row["labels"] != -100)).sum())
    scores = task.score(together, None, "val")
    assert scores is not None
    losses, tokens = (np.array([one[name] for one in together]) for name in ("lm_loss", "num_tokens"))
    assert scores.measures["perplexity"].value == pytest.approx(np.exp((losses * tokens).sum() / tokens.sum()))
    assert scores.agg_metrics == pytest.approx(np.mean([one["loss"] for one in together]))


def test_dialogues_are_answered_where_the_recipe_evaluates(
    dialogue: tuple[GPTDialogue, dict[str, torch.Tensor]],
) -> None:
    model, batch = dialogue
    task = DialogueTask({"evaluate": True, "max_len": 4, "num_beams": 1})
    with torch.no_grad():
        results = task.valid_step(model, batch)
    assert all(isinstance(one["answer"], str) for one in results)
    records = [{"instance_id": str(at), "answer": "yes , he is"} for at in range(len(results))]
    scores = task.score(results, SimpleNamespace(annotation=records), "test")
    assert scores is not None
    assert {"loss", "perplexity", "exact_match", "Bleu_1", "CIDEr"} <= set(scores.metrics())
    assert scores.agg_metrics == scores.measures["loss"].value


def test_conversations_are_not_taken_apart() -> None:
    """A batch that stays whole counts as often as it has samples."""
    batch = {"conversations": [[], []], "image": pictures(2)}
    assert rows_of(batch) == [batch]
    task = DialogueTask({})
    results = [{"instance_id": None, "loss": loss, "num_samples": count} for loss, count in ((1.0, 3), (5.0, 1))]
    scores = task.score(task.unique(results), None, "val")
    assert scores is not None
    assert scores.agg_metrics == pytest.approx(2.0)
    assert "perplexity" not in scores.measures


# -- boxes


class Pointer(torch.nn.Module):
    def locate(self, samples: dict[str, Any], max_len: int = 9) -> list[str]:
        assert max_len == 9
        return [f"here [[{text}]]" for text in samples["text_input"]]


def test_referring_expressions() -> None:
    task = GroundingTask({"max_new_tokens": 9})  # MPP-LLaVA's name of max_len
    samples = {"image": [None] * 3, "text_input": ["100,100,500,500", "0,0,10,10", "none"], "instance_id": [0, 1, 2]}
    results = task.valid_step(Pointer(), samples)
    records = [
        {"bbox": [20, 10, 80, 40], "width": 200, "height": 100},
        {"box": [20, 10, 100, 50], "width": 200, "height": 100},
        {"box": [20, 10, 100, 50], "width": 200, "height": 100},
    ]
    with pytest.raises(AssertionError):
        GroundingTask({"max_len": 8, "max_new_tokens": 9}).valid_step(Pointer(), samples)
    scores = task.score(results, SimpleNamespace(annotation=records), "val")
    assert scores is not None
    assert scores.metrics() == pytest.approx(
        {"accuracy@0.5": 100 / 3, "mean_iou": 1 / 3, "readable": 200 / 3, "agg_metrics": 100 / 3}
    )
    assert scores.references[0] == "[[100,100,500,500]]"
    with pytest.raises(ConfigError, match="names no boxes"):
        task.valid_step(Classifier(), samples)
    wrong = (({"bbox": [1, 2, 3, 4]}, "needs bbox or box"), ({**records[0], "bbox": [1]}, "bbox or box"))
    for record, message in wrong:
        with pytest.raises(DataError, match=f"Sample 'x'.*{message}"):
            target_of(record, "x")


# -- retrieval


class Pairs(torch.utils.data.Dataset):
    """Three pictures, five texts."""

    def __init__(self) -> None:
        self.pixels = pictures(3)
        self.text = ["the man", "a woman", "a dog", "red", "in the water"]
        self.image = ["a", "b", "c"]
        self.img2txt = {0: [0, 1], 1: [2], 2: [3, 4]}
        self.txt2img = {0: 0, 1: 0, 2: 1, 3: 2, 4: 2}

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index], "index": index}


def retrieve(mine: Sequence[int]) -> dict[str, Any] | None:
    """Rank anew by the matching head; this process has these pictures."""
    model, data = blip(BlipFeatureExtractor, "blip_feature_extractor"), Pairs()
    if model.network.itm_head is None:
        torch.manual_seed(4)
        model.network.itm_head = torch.nn.Linear(model.network.config.text_config.hidden_size, 2)
    task = RetrievalTask({"k_test": 2})
    task.before_evaluation(model=model, dataset=data)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, list(mine)), batch_size=2)
    return task.after_evaluation(val_result=task.evaluation(model, loader), split_name="test")


def test_retrieval_by_features() -> None:
    model, data = blip(BlipFeatureExtractor, "blip_feature_extractor"), Pairs()
    task = RetrievalTask({})
    task.before_evaluation(model=model, dataset=data)
    (matrices,) = task.evaluation(model, torch.utils.data.DataLoader(data, batch_size=2))
    similar = model.similarity({"image": data.pixels, "text_input": data.text}).numpy()
    np.testing.assert_allclose(matrices["by_image"], similar, **ROUNDING)
    metrics = task.after_evaluation(val_result=[matrices], split_name="test")
    assert metrics is not None
    best = similar.argmax(1)
    assert metrics["txt_r1"] == pytest.approx(100 * np.mean([best[at] in data.img2txt[at] for at in range(3)]))
    assert metrics["img_r5"] == 100.0
    assert metrics["agg_metrics"] == pytest.approx(np.mean([metrics[f"txt_r{depth}"] for depth in (1, 5, 10)]))


@torch.no_grad()
def test_retrieval_ranks_the_best_anew() -> None:
    model, data = blip(BlipFeatureExtractor, "blip_feature_extractor"), Pairs()
    if model.network.itm_head is None:
        model.network.itm_head = torch.nn.Linear(model.network.config.text_config.hidden_size, 2)
    task = RetrievalTask({"k_test": 2})
    task.before_evaluation(model=model, dataset=data)
    (found,) = task.evaluation(model, torch.utils.data.DataLoader(data, batch_size=3))
    similar = model.similarity({"image": data.pixels, "text_input": data.text}).numpy()
    assert ((found["by_image"] > -99).sum(1) == 2).all()
    assert ((found["by_text"] > -99).sum(1) == 2).all()
    for image, row in enumerate(similar):
        assert set(np.flatnonzero(found["by_image"][image] > -99)) == set(np.argsort(row)[-2:])
    for text, row in enumerate(similar.T):
        for image in np.flatnonzero(found["by_text"][text] > -99):
            states = model.extract_features({"image": data.pixels[image][None], "text_input": [data.text[text]]})
            logit = float(model.network.itm_head(states.multimodal_embeds[:, 0])[0, 1])
            assert found["by_text"][text, image] == pytest.approx(logit + row[image], abs=ROUNDING["atol"])


def test_retrieval_by_a_model_of_ones_own() -> None:
    class Own(torch.nn.Module):
        def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[np.ndarray, np.ndarray]:
            assert task_cfg["k_test"] == 3
            return np.eye(3, 5), np.eye(5, 3)

    task = RetrievalTask({"k_test": 3})
    task.before_evaluation(model=Own(), dataset=Pairs())
    results = task.evaluation(Own(), [])
    metrics = task.after_evaluation(val_result=results, split_name="test")
    assert metrics is not None
    assert metrics["txt_r1"] == pytest.approx(100 / 3)
    with pytest.raises(ConfigError, match="gives no features to compare"):
        task.evaluation(Classifier(), [])


# -- models that chat


@pytest.fixture(scope="module")
def pocket() -> ChatModel:
    return ChatModel(load(POCKET, device="cpu")).eval()


def test_chat_models_answer_all_kinds(pocket: ChatModel) -> None:
    images = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    samples = {"image": images, "text_input": ["What colour is it?", "Is it {big}?"]}
    together = pocket.predict_answers(samples)
    pairs = zip(images, samples["text_input"], strict=True)
    alone = [pocket.predict_answers({"image": [image], "text_input": text})[0] for image, text in pairs]
    assert together == alone
    captions, short = pocket.generate(samples), pocket.generate(samples, max_length=2)
    assert all(len(one) < len(other) for one, other in zip(short, captions, strict=True))
    boxes, cut = pocket.locate(samples), pocket.locate(samples, max_len=2)
    assert all(len(one) < len(other) for one, other in zip(cut, boxes, strict=True))
    for place, reply in pocket.choose(samples, [["red", "blue"], ["yes", "no"]]):
        assert place in (None, 0, 1)
        assert reply
    with pytest.raises(DataError, match="27 choices"):
        pocket.choose(samples, [["x"] * 27, ["y"]])
    with pytest.raises(DataError, match="1 questions and 2 pictures"):
        pocket.predict_answers({"image": images, "text_input": ["one"]})
    with pytest.raises(DataError, match="as they are"):
        pocket.predict_answers({"image": pictures(1), "text_input": ["one"]})


def test_short_answers_are_the_first_line_and_choices_are_read_from_all() -> None:
    """A model that says more than it was asked for, and one question after the other."""
    asked: list[str] = []

    def batch(conversations: Any, **options: Any) -> list[Any]:
        asked.extend(one[0]["content"][1]["text"] for one in conversations)
        return [SimpleNamespace(text="\nRed\nIt is B.")] * len(conversations)

    network = torch.nn.Linear(1, 1)
    network.config = SimpleNamespace(model_type="other")  # type: ignore[assignment]
    model = ChatModel(SimpleNamespace(capabilities=("batch",), model=network, batch=batch))  # type: ignore[arg-type]
    samples = {"image": [Image.new("RGB", (4, 4))], "text_input": ["What colour?"]}
    assert model.predict_answers(samples) == ["Red"]
    assert model.choose(samples, [["green", "blue"]]) == [(1, "Red\nIt is B.")]
    assert asked == [
        "What colour?\nAnswer the question using a single word or phrase.",
        "What colour?\nA. green\nB. blue\nAnswer with the option's letter from the given choices directly.",
    ]


def test_texts_of_questions() -> None:
    asked = put("{question} Now: {choices}!", "What {choices} {question}?", "A. x")
    assert asked == "What {choices} {question}? Now: A. x!"
    assert first_line("\n  red \nbecause it is") == "red"
    assert first_line("") == ""


def test_what_holds_no_conversation_is_no_chat_model() -> None:
    vlm = load(FIXTURES / "blip_vqa" / "open" / "checkpoint", config=HEADS)
    with pytest.raises(ConfigError, match="holds no conversation"):
        ChatModel(vlm)
