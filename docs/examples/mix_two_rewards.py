"""Two rewards, two LoRAs: turned up and down, and mixed, when pictures are made and not when one trains. Two minutes on a CPU.

    python docs/examples/mix_two_rewards.py

As in DRaFT's paper (arXiv 2309.17400), whose LoRAs are scaled and mixed after training.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import diffalign

HERE = Path(__file__).parent
SHAPES = diffalign.model_folder("shapes")
PROMPTS = ["two small red squares on a white background", "a large green circle on a white background"]

clip = diffalign.align("shapes", method="draft", reward="shapes-clip", steps=50)
colour = diffalign.align("shapes", method="draft", reward=f"{HERE / 'own_reward.py'}:colourful", steps=20)

# Plain diffusers holds both LoRAs beside one another. A weight multiplies an update of the network, so 0 is the base model.
pipe = StableDiffusionPipeline.from_pretrained(SHAPES, dtype=torch.float32)
pipe.load_lora_weights(clip.path / "lora", adapter_name="clip")
pipe.load_lora_weights(colour.path / "lora", adapter_name="colour")


def draw(weights):
    pipe.set_adapters(["clip", "colour"], weights)
    noise = torch.Generator().manual_seed(0)  # the same every time: what changes is the weights' doing
    return pipe(PROMPTS * 2, num_inference_steps=10, guidance_scale=1.0, generator=noise).images


scaled = [draw([weight, 0.0]) for weight in (0.0, 0.5, 1.0, 1.5)]
mixed = [draw([1 - weight, weight]) for weight in (0.25, 0.5, 0.75, 1.0)]
columns = [*scaled, *mixed]
sheet = Image.new("RGB", (96 * len(columns), 96 * len(columns[0])))
for x, pictures in enumerate(columns):
    for y, picture in enumerate(pictures):
        sheet.paste(picture.resize((96, 96), Image.Resampling.NEAREST), (96 * x, 96 * y))

# The mixture that pleases becomes a run of its own: one LoRA, exactly the weighted sum, to be evaluated, exported, trained on.
both = diffalign.merge([clip, colour], [0.5, 0.5], output=clip.path.with_name(f"{clip.path.name}-mixed"))
sheet.save(both.path / "scaled-and-mixed.png")
print(both.path / "scaled-and-mixed.png")
print(f"What it scores: diffalign eval {both.path}")
