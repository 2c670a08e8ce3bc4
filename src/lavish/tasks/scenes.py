"""Train and score the pocket model on drawn scenes.

Training has three stages, each a run of its own recipe section. `tower`: the vision tower alone, on dense labels of the drawing. `decoder`:
merge, projector and decoder alone, on text, with a code of the true labels in the tower's place. `joint`: everything, on text, with the dense
labels kept as an auxiliary loss. Scoring asks held-out questions through the same `lavish.load` and `vlm.batch` that users call.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from lavish.common import config as configs
from lavish.common.errors import ConfigError
from lavish.datasets.scenes.dataset import SceneDataset
from lavish.datasets.scenes.questions import Question, ask
from lavish.datasets.scenes.score import score, summarise
from lavish.datasets.scenes.tokenizer import COORDINATE_BASE, build_tokenizer, save_tokenizer
from lavish.datasets.scenes.world import draw, sample_scene
from lavish.inference.vlm import VLM
from lavish.models import family
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.tasks.base_task import BaseTask
from lavish.tasks.scenes_learner import STAGES, SceneLearner, initialise

LEARNER_FILE = "learner.safetensors"


@dataclass
class SceneTaskConfig:
    """The `task:` section of a scenes recipe."""

    stage: str = field(default="joint", metadata={"help": "`tower`, `decoder` or `joint`."})
    dense_weight: float = field(default=0.1, metadata={"help": "Weight of the dense losses in the joint stage."})
    code_noise: float = field(
        default=0.3, metadata={"help": "Standard deviation of the noise on the code, decoder stage."}
    )
    attn_implementation: str = field(
        default="eager",
        metadata={"help": "`eager` or `sdpa`; at these sizes eager is the faster one in bfloat16 on CPU."},
    )
    tower_from: str = field(default="", metadata={"help": "Stage whose tower and dense heads to start from."})
    decoder_from: str = field(default="", metadata={"help": "Stage whose merge, projector and decoder to start from."})


@dataclass
class SceneDataConfig:
    """The `datasets.scenes:` section of a recipe."""

    num_samples: int = field(default=1_000_000, metadata={"help": "Pictures of one training epoch."})
    seed: int = field(default=1, metadata={"help": "Seed of the training scenes; held-out ones use others."})
    num_conversations: int = field(default=12, metadata={"help": "Most questions packed behind one picture."})
    max_text_tokens: int = field(
        default=240, metadata={"help": "Tokens of all questions and answers behind one picture."}
    )
    picture_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "Sides to draw at before the resize to the network's, in pixels; empty: the network's own."},
    )
    num_questions: int = field(default=2000, metadata={"help": "Held-out questions of an evaluation."})
    questions_per_picture: int = field(default=5, metadata={"help": "Questions about one held-out picture."})
    scene: dict[str, Any] = field(default_factory=dict, metadata={"help": "Arguments of sample_scene."})


class ScenesTask(BaseTask):
    """The pocket model's training task."""

    def __init__(self, config: DictConfig):
        self.task = configs.check(config.get("task") or {}, SceneTaskConfig)
        self.data = configs.check((config.get("datasets") or {}).get("scenes") or {}, SceneDataConfig)
        if self.task.stage not in STAGES:
            raise ConfigError(f"task.stage is {self.task.stage!r}; the stages are {', '.join(STAGES)}.")
        self.seed = int(config.run.get("seed", 42))
        self.stage_folder = Path(config.run.output_dir)
        self.config = config

    @classmethod
    def setup_task(cls, config: DictConfig) -> "ScenesTask":
        """Build the task from a merged recipe."""
        return cls(config)

    def _network_config(self) -> Any:
        model = self.config.get("model") or {}
        if model.get("arch") != "cogvlm" or not model.get("config"):
            raise ConfigError(
                f"The scenes task trains a CogVLM from nothing: it needs model.arch 'cogvlm' and the network's fields in model.config; "
                f"found arch {model.get('arch')!r} and the sections {', '.join(map(str, model)) or 'none'}."
            )
        fields = {**OmegaConf.to_container(model.config), "vocab_size": build_tokenizer().get_vocab_size()}  # type: ignore[dict-item]
        config = family("cogvlm").read_config(fields, "model.config")
        config._attn_implementation = self.task.attn_implementation
        return config

    def build_model(self) -> SceneLearner:
        """Build the network with its starting weights, and take over the parts that earlier stages trained."""
        torch.manual_seed(self.seed)
        network = CogVLMForCausalLM(self._network_config())
        initialise(network, COORDINATE_BASE)
        learner = SceneLearner(network, self.task.stage, self.task.dense_weight, self.task.code_noise)
        for stage, is_tower in ((self.task.tower_from, True), (self.task.decoder_from, False)):
            if stage:
                self._take_over(learner, stage, is_tower)
        return learner

    def _take_over(self, learner: SceneLearner, stage: str, tower: bool) -> None:
        path = self.stage_folder.parent / stage / LEARNER_FILE
        if not path.is_file():
            raise ConfigError(
                f"{path}: stage {self.task.stage!r} starts from stage {stage!r}, which has not finished; run it first."
            )
        state = load_file(path)
        parts = ("heads.", "network.model.vision.patch_embedding.", "network.model.vision.transformer.")
        chosen = {name: tensor for name, tensor in state.items() if name.startswith(parts) == tower}
        learner.load_state_dict(chosen, strict=False)

    def build_datasets(self) -> dict[str, Dataset]:
        """Give the endless training scenes as `train`."""
        config = self._network_config()
        vision = config.vision_config
        data = SceneDataset(
            num_samples=self.data.num_samples,
            seed=self.data.seed,
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            num_image_tokens=config.num_image_tokens,
            num_conversations=self.data.num_conversations,
            max_text_tokens=self.data.max_text_tokens,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            scene=self.data.scene,
            picture_sizes=self.data.picture_sizes,
            with_picture=self.task.stage != "decoder",
            with_text=self.task.stage != "tower",
        )
        return {"train": data}

    def finish(self, model: SceneLearner, folder: Path) -> None:
        """Write all that was trained (`learner.safetensors`) and the network as a folder that `lavish.load` opens (`model/`)."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        partial = folder / f"{LEARNER_FILE}.partial"
        save_file(state, partial)
        partial.replace(folder / LEARNER_FILE)
        export(model.network, folder / "model")

    def evaluation(self, vlm: VLM, folder: Path, batch_size: int, report: Callable[[int, int], None]) -> dict[str, Any]:
        """Ask every held-out question, write each answer to `answers.jsonl` and give the scores (`score.summarise`)."""
        questions = list(self._held_out())
        results: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "answers.jsonl.partial"
        with partial.open("w", encoding="utf-8") as file:
            for start in range(0, len(questions), batch_size):
                for result in _answer(vlm, questions[start : start + batch_size]):
                    results.append(result)
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                report(len(results), len(questions))
        partial.replace(folder / "answers.jsonl")
        return summarise(results)

    def _held_out(self) -> Iterator[tuple[Any, Question]]:
        """Draw the pictures and questions of the evaluation, from seeds that training never uses."""
        data = self.data
        sizes = data.picture_sizes or [112]
        for index in range(-(-data.num_questions // data.questions_per_picture)):
            rng = np.random.default_rng([data.seed, index])
            scene = sample_scene(rng, **data.scene)
            picture = draw(scene, sizes[index % len(sizes)])
            left = data.num_questions - index * data.questions_per_picture
            for question in ask(scene, rng, data.questions_per_picture)[:left]:
                yield picture, question


def _answer(vlm: VLM, questions: list[tuple[Any, Question]]) -> Iterator[dict[str, Any]]:
    """Answer a batch; rows of one template go together, because a batch has one."""
    answers: dict[int, str] = {}
    for template in sorted({question.template for _, question in questions}):
        rows = [row for row, (_, question) in enumerate(questions) if question.template == template]
        content = [
            [{"type": "image", "image": questions[row][0]}, {"type": "text", "text": questions[row][1].question}]
            for row in rows
        ]
        replies = vlm.batch(
            [[{"role": "user", "content": parts}] for parts in content], chat_template=template, max_new_tokens=200
        )
        answers.update(zip(rows, (reply.text for reply in replies), strict=True))
    for row, (_, question) in enumerate(questions):
        result = {
            "task": question.task,
            "language": question.language,
            "template": question.template,
            "question": question.question,
            "answer": question.answer,
            "prediction": answers[row],
        }
        yield {**result, "score": score(question.task, answers[row], question.answer)}


def export(network: CogVLMForCausalLM, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write network and tokenizer as a released folder, whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    stored = copy.deepcopy(network).to("cpu", dtype)
    stored.save_pretrained(partial)
    save_tokenizer(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
