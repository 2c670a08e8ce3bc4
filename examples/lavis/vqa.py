"""Ask BLIP about a picture: the second usage of LAVIS's tutorial."""

import argparse

import torch
from PIL import Image

from lavish.models import load_model_and_preprocess

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", help="a picture")
parser.add_argument("--question", default="Which city is this photo taken?")
parser.add_argument("--checkpoint", help="a .pth file of LAVIS or a transformers folder; default: fetch the release")
parser.add_argument("--config", help="JSON or YAML: the fields of a model of other sizes")
parser.add_argument("--model-type", default="vqav2", help="vqav2, okvqa or aokvqa")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
raw_image = Image.open(arguments.image).convert("RGB")

model, vis_processors, txt_processors = load_model_and_preprocess(
    name="blip_vqa",
    model_type=arguments.model_type,
    is_eval=True,
    device=device,
    checkpoint=arguments.checkpoint,
    config=arguments.config,
)
image = vis_processors["eval"](raw_image).unsqueeze(0).to(device)
question = txt_processors["eval"](arguments.question)
samples = {"image": image, "text_input": question}

print("greedy:", model.predict_answers(samples=samples, inference_method="generate", num_beams=1))
print("3 beams:", model.predict_answers(samples=samples, inference_method="generate", num_beams=3))
answers = ["london", "paris", "a city", "the house", "yes", "no"]
print("best of the list:", model.predict_answers(samples=samples, inference_method="rank", answer_list=answers))
