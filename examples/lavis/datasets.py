"""Look at a data set: the fourth usage of LAVIS's tutorial."""

import argparse

from lavish.datasets.builders import dataset_zoo, load_dataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", nargs="?", default="coco_caption", help="a name of the zoo")
parser.add_argument("--pictures", help="folder of the pictures; default: the cache, where lavish puts none")
parser.add_argument("--config", help="a YAML with the section of the data set, for files of your own")
arguments = parser.parse_args()

dataset_names = dataset_zoo.get_names()
print(f"{len(dataset_names)} names:", ", ".join(dataset_names))

# The annotations are fetched to the cache the first time; LAVISH_OFFLINE=1 says where to put them instead.
splits = load_dataset(arguments.name, cfg_path=arguments.config, vis_path=arguments.pictures)
print("splits:", {split: len(dataset) for split, dataset in splits.items()})

first = next(iter(splits.values()))
print("annotation:", first.annotation[0])
if arguments.pictures:
    print("sample:", first[0])
