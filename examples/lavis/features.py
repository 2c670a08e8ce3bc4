"""Features of a picture and a text with BLIP: the third usage of LAVIS's tutorial."""

import argparse

import torch
from PIL import Image

from lavish.models import load_model_and_preprocess

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", help="a picture")
parser.add_argument("--caption", default="a large fountain spewing water into the air")
parser.add_argument("--checkpoint", help="a .pth file of LAVIS or a transformers folder; default: fetch the release")
parser.add_argument("--config", help="JSON or YAML: the fields of a model of other sizes")
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
raw_image = Image.open(arguments.image).convert("RGB")

model, vis_processors, txt_processors = load_model_and_preprocess(
    name="blip_feature_extractor",
    model_type="base",
    is_eval=True,
    device=device,
    checkpoint=arguments.checkpoint,
    config=arguments.config,
)
image = vis_processors["eval"](raw_image).unsqueeze(0).to(device)
text_input = txt_processors["eval"](arguments.caption)
sample = {"image": image, "text_input": [text_input]}

features_multimodal = model.extract_features(sample)
print("multimodal:", tuple(features_multimodal.multimodal_embeds.shape))
print("for a classifier:", tuple(features_multimodal.multimodal_embeds[:, 0, :].shape))

features_image = model.extract_features(sample, mode="image")
features_text = model.extract_features(sample, mode="text")
print("image:", tuple(features_image.image_embeds.shape), tuple(features_image.image_embeds_proj.shape))
print("text:", tuple(features_text.text_embeds.shape), tuple(features_text.text_embeds_proj.shape))

similarity = features_image.image_embeds_proj[:, 0, :] @ features_text.text_embeds_proj[:, 0, :].t()
print("similarity:", similarity.tolist())
