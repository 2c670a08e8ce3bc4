"""Evaluate by a recipe: the last usage of LAVIS's tutorial, and what its evaluate.py does.

    python examples/lavis/evaluate.py --cfg-path projects/blip/eval/vqav2_eval.yaml --options run.batch_size_eval=8
    python -m torch.distributed.run --nproc_per_node=2 examples/lavis/evaluate.py --cfg-path ...

`lavish evaluate` is the same as a command, with a progress bar and tables.
"""

import argparse

from lavish.common.config import Config
from lavish.runners.evaluation import evaluate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cfg-path", required=True, help="the recipe, a YAML file")
parser.add_argument("--options", nargs="+", help="keys of the recipe to replace, run.batch_size_eval=8")

evaluation = evaluate(Config(parser.parse_args()))
for split in evaluation.splits:  # in the first process; the others have none
    if split.scores is None:
        print(f"{split.name}: no ground truth; the file for its leaderboard is in {evaluation.folder}")
        continue
    for name, measure in split.scores.measures.items():
        low, high = measure.interval()
        print(f"{split.name}: {name} {measure.value:.2f} ({low:.2f} to {high:.2f})")
    report = evaluation.folder / "report.html"
    print(f"{split.name}: {report}")
