"""Caption a picture with BLIP: the first usage of LAVIS's tutorial."""

import argparse

import torch
from PIL import Image

from lavish.models import load_model_and_preprocess

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", help="a picture")
parser.add_argument("--checkpoint", help="a .pth file of LAVIS or a transformers folder; default: fetch the release")
parser.add_argument("--config", help="JSON or YAML: the fields of a model of other sizes")
parser.add_argument("--model-type", default="base_coco", help="base_coco or large_coco")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
raw_image = Image.open(arguments.image).convert("RGB")

model, vis_processors, _ = load_model_and_preprocess(
    name="blip_caption",
    model_type=arguments.model_type,
    is_eval=True,
    device=device,
    checkpoint=arguments.checkpoint,
    config=arguments.config,
)
image = vis_processors["eval"](raw_image).unsqueeze(0).to(device)

print("greedy:", model.generate({"image": image}, num_beams=1, top_p=0.9, max_length=20, min_length=5))
print("3 beams:", model.generate({"image": image}))
print("drawn:", model.generate({"image": image}, use_nucleus_sampling=True, num_captions=3))
print("prompt:", model.generate({"image": image}, prompt="a photo of the "))
