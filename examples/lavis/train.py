"""Fine-tune by a recipe, in the lines of LAVIS's train.py; `lavish train` does the same, checks more and shows a bar.

python examples/lavis/train.py --cfg-path projects/blip/train/caption_coco_ft.yaml --options run.max_epoch=2
python -m torch.distributed.run --nproc_per_node=2 examples/lavis/train.py --cfg-path ...
"""

import argparse

import lavish.tasks as tasks
from lavish.common.config import Config
from lavish.common.registry import registry
from lavish.runners.recipe import seed_all

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--cfg-path", required=True, help="the recipe, a YAML file")
parser.add_argument("--options", nargs="+", help="keys of the recipe to replace, run.max_epoch=2")
cfg = Config(parser.parse_args())

seed_all(cfg.run_cfg.seed)
task = tasks.setup_task(cfg)
datasets = task.build_datasets(cfg)
model = task.build_model(cfg)

runner_class = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base"))
runner = runner_class(cfg=cfg, job_id=None, task=task, model=model, datasets=datasets)
runner.train()
print(f"{runner.num_steps} steps; checkpoints and log.txt are in {runner.folder.path}")
