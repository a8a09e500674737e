"""Align a pipeline that your script holds already, and go on using it. A minute on a CPU.

python docs/examples/live_pipeline.py
"""

import torch
from diffusers import StableDiffusionPipeline

import diffalign

SHAPES = diffalign.model_folder("shapes")  # the embedded model; yours is a folder or a Hub id
PROMPT = "two small red squares on a white background"


def draw(pipe):
    noise = torch.Generator().manual_seed(3)  # the same before and after
    return pipe([PROMPT] * 4, num_inference_steps=10, guidance_scale=1.0, generator=noise).images


pipe = StableDiffusionPipeline.from_pretrained(SHAPES, dtype=torch.float32)  # its files are fp16: a LoRA trains in fp32
before = draw(pipe)

# A live object brings no settings along, as the name "shapes" does, so the script says them. The rest is the method's own: DRaFT's.
run = diffalign.align(
    pipe,
    method="draft",
    reward="shapes-clip",  # or a function of yours: see own_reward.py
    prompts="shapes",  # or a list of texts; a tenth of it is then held out
    eval_prompts="shapes",
    steps=40,
    batch_size=24,
    learning_rate=2e-3,
    guidance_scale=1.0,
    k=5,
    inference_steps=10,
)
print("held out:", run.evaluation["rewards"]["shapes-clip"])

# `pipe` is the object from above: the LoRA is on it, and it is called as before.
after = draw(pipe)
for name, pictures in {"before": before, "after": after}.items():
    for i, picture in enumerate(pictures):
        picture.save(run.path / f"{name}-{i}.png")

# In another process, without diffalign: pipe.load_lora_weights("runs/NAME/lora")
print("the LoRA and the pictures:", run.path)
