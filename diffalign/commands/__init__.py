"""The commands, a module each: its `run` takes the words after the command's name, and gives the exit status."""

COMMANDS = {
    "train": "align a model with a reward",
    "sample": "pictures or sounds of a prompt, before and after",
    "eval": "held-out rewards of a run, before and after",
    "score": "score pictures or sounds that exist",
    "serve": "a reward over HTTP, for diffalign train --reward remote",
    "pairs": "preference pairs from a model's samples and a reward, for the offline methods",
    "label": "a page where people compare samples, and what came of it",
    "reward": "train a reward from preferences or ratings, and test rewards on preferences",
    "edits": "a model's own edits, good and bad, for HIVE",
    "export": "a run's LoRA as one file for AUTOMATIC1111, ComfyUI and the like",
    "push": "a run's LoRA onto the Hugging Face Hub, with its model card",
    "report": "a page of a run: curves, pictures through training, held-out table, settings",
    "merge": "the LoRAs of several runs added up with weights, or one taken further, as a run of its own",
    "compare": "finished runs side by side: rewards, KL, diversity, and what they took",
    "check": "preflight: would this training learn?",
    "list": "methods, rewards and pipelines, with what each needs",
    "doctor": "versions, devices, extras",
}
