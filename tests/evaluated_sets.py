"""Local sets in the form of the zoo's, and the overrides that put BLIP's tiny fixtures in the place of its weights.

Run as a program it evaluates a recipe and can be killed: `python evaluated_sets.py RECIPE KILL_RANK AFTER OPTION ...`
ends the process of that rank, as kill -9 does, once it has answered so many batches.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "fixtures"
EVAL = ROOT / "projects" / "blip" / "eval"
NAMES = tuple(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 73, 74, 133, 139, 192, 544))
ANSWERS = ["red", "green", "old", "2", "yes", "man"]


def draw(folder: Path) -> None:
    """Draw seven pictures of different sizes."""
    for at, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (70 + 9 * at, 64), ((37 * at) % 256, 90, (200 - 23 * at) % 256))
        ImageDraw.Draw(picture).ellipse((5 * at, 8, 30 + 5 * at, 40), fill=(250, (60 * at) % 256, 40))
        picture.save(path)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def fill(cache: Path) -> Path:
    """Fill a cache folder with COCO captions and questions, OK-VQA, A-OKVQA, GQA and nocaps, and give it."""
    draw(cache / "coco" / "images")
    draw(cache / "nocaps" / "images")
    draw(cache / "gqa" / "images")
    captions = [["A man left of blue.", "Somebody left blue"], ["of left left", "blue of blue of."], ["left of left"]]
    rows = [{"image": name, "caption": captions[at % 3]} for at, name in enumerate(NAMES)]
    train = [{"image": name, "caption": "a dog", "image_id": f"coco_{at}"} for at, name in enumerate(NAMES)]
    annotations = cache / "coco" / "annotations"
    write(annotations / "coco_karpathy_train.json", train)
    for split in ("val", "test"):
        write(annotations / f"coco_karpathy_{split}.json", rows)
        hidden = [{"image": name, "img_id": at} for at, name in enumerate(NAMES)]
        write(cache / "nocaps" / "annotations" / f"nocaps_{split}.json", hidden)
    questions = [
        {"image": name, "question": f"What colour is thing {at}?", "question_id": 1000 + at}
        for at, name in enumerate(NAMES)
    ]
    official = [
        {
            "question_id": 1000 + at,
            "question_type": "what colour is",
            "answer_type": "number" if at % 3 == 0 else "other",
            "answers": [
                {"answer": ANSWERS[(at + place // 7) % 6], "answer_id": place + 1, "answer_confidence": "yes"}
                for place in range(10)
            ],
        }
        for at in range(len(NAMES))
    ]
    for folder, version in ((annotations, "v2_"), (cache / "okvqa" / "annotations", "")):
        write(folder / "vqa_val_eval.json", questions)
        write(folder / "answer_list.json", ANSWERS)
        write(folder / f"{version}OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
        write(folder / f"{version}mscoco_val2014_annotations.json", {"annotations": official})
    direct = [
        {
            **one,
            "choices": ANSWERS[:4],
            "correct_choice_idx": at % 4,
            "direct_answers": [ANSWERS[at % 6]] * 2 + ["x"] * 8,
        }
        for at, one in enumerate(questions)
    ]
    write(cache / "aokvqa" / "annotations" / "aokvqa_v1p0_val.json", direct)
    hidden = [{**one, "choices": ANSWERS[:4]} for one in questions]
    write(cache / "aokvqa" / "annotations" / "aokvqa_v1p0_test.json", hidden)
    write(cache / "aokvqa" / "annotations" / "specialized_vocab_train_lavis.json", ANSWERS)
    return cache


def tiny(name: str, output: Path, *more: str) -> list[str]:
    """Give the overrides for a tiny fixture of BLIP: `blip_caption` or `blip_vqa`."""
    checkpoint = FIXTURES / name / "open" / "checkpoint"
    heads = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128}"
    return [
        f"model.finetuned={next(checkpoint.glob('*.pth'))}",
        f"model.vision_config={heads}",
        f"model.tokenizer={checkpoint / 'bert-base-uncased'}",
        "model.image_size=64",
        "model.max_txt_len=10",
        "run.num_workers=0",
        "run.batch_size_eval=2",
        "run.device=cpu",
        f"run.output_dir={output}",
        *more,
    ]


def sized(dataset: str, *more: str) -> list[str]:
    """Give the override for the size of a data set's pictures."""
    return [f"datasets.{dataset}.vis_processor.eval.image_size=64", *more]


def main() -> None:
    import torch

    from lavish.cli import main as command
    from lavish.common import dist
    from lavish.runners import evaluation

    torch.set_num_threads(1)
    recipe, kill_rank, after, *options = sys.argv[1:]
    answered: list[int] = []
    rows_of = evaluation.rows_of

    def noted(dataset: str, split: str, indices: Any, results: Any) -> Any:
        answered.extend(indices)
        noted.batches += 1
        if dist.rank() == int(kill_rank) and noted.batches > int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        return rows_of(dataset, split, indices, results)

    noted.batches = 0
    evaluation.rows_of = noted
    status = command(["evaluate", recipe, *options])
    sys.stdout.write(json.dumps({"rank": dist.rank(), "answered": answered}) + "\n")  # whole: two processes write
    sys.stdout.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
