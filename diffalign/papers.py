"""What to cite for a run: the papers of its method, its rewards and its adapter, as docs/papers.md has them."""

from __future__ import annotations

from collections.abc import Iterable

# arXiv id: (authors, title, where)
PAPERS = {
    "2309.17400": ("Clark et al.", "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", "ICLR 2024"),
    "2305.13301": ("Black et al.", "Training Diffusion Models with Reinforcement Learning", "ICLR 2024"),
    "2505.05470": ("Liu et al.", "Flow-GRPO: Training Flow Matching Models via Online RL", "2025"),
    "2505.07818": ("Xue et al.", "DanceGRPO: Unleashing GRPO on Visual Generation", "2025"),
    "2405.14632": ("Chen et al.", "Reinforcement Learning for Fine-tuning Text-to-speech Diffusion Models", "2024"),
    "2305.16381": ("Fan et al.", "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models", "NeurIPS 2023"),
    "2402.08714": (
        "Deng et al.",
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        "CVPR 2024",
    ),
    "2311.13231": ("Yang et al.", "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", "CVPR 2024"),
    "2302.12192": ("Lee et al.", "Aligning Text-to-Image Models using Human Feedback", "2023"),
    "2304.06767": ("Dong et al.", "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", "2023"),
    "2304.05977": ("Xu et al.", "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", "NeurIPS 2023"),
    "2310.03739": ("Prabhudesai et al.", "Aligning Text-to-Image Diffusion Models with Reward Backpropagation", "2023"),
    "2311.12908": ("Wallace et al.", "Diffusion Model Alignment Using Direct Preference Optimization", "CVPR 2024"),
    "2404.04465": ("Li et al.", "Aligning Diffusion Models by Optimizing Human Utility", "NeurIPS 2024"),
    "2406.06424": ("Hong et al.", "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference", "2024"),
    "2303.09618": ("Zhang et al.", "HIVE: Harnessing Human Feedback for Instructional Visual Editing", "CVPR 2024"),
    "2306.09341": (
        "Wu et al.",
        "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis",
        "2023",
    ),
    "2305.01569": ("Kirstain et al.", "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", "NeurIPS 2023"),
    "2103.00020": ("Radford et al.", "Learning Transferable Visual Models From Natural Language Supervision", "ICML 2021"),
    "2104.08718": ("Hessel et al.", "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", "EMNLP 2021"),
    "2210.08402": (
        "Schuhmann et al.",
        "LAION-5B: An open large-scale dataset for training next generation image-text models",
        "NeurIPS 2022",
    ),
    "2404.16792": ("Zheng et al.", "Weak-to-Strong Extrapolation Expedites Alignment", "2024"),
    "2106.09685": ("Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", "ICLR 2022"),
}
LORA = ("2106.09685",)
EXPO = {"expo": ("2404.16792",)}  # `diffalign merge --extrapolate`
METHODS = {
    "draft": ("2309.17400",),
    "draft-lv": ("2309.17400",),
    "ddpo": ("2305.13301",),
    "flow-grpo": ("2505.05470",),
    "flow-grpo-fast": ("2505.05470",),
    "dance-grpo": ("2505.07818",),
    "dlpo": ("2405.14632",),
    "dpok": ("2305.16381",),
    "prdp": ("2402.08714",),
    "d3po": ("2311.13231",),
    "rwr": ("2302.12192", "2305.13301"),
    "raft": ("2304.06767",),
    "refl": ("2304.05977",),
    "alignprop": ("2310.03739",),
    "diffusion-dpo": ("2311.12908",),
    "kto": ("2404.04465",),
    "mapo": ("2406.06424",),
    "hive": ("2303.09618",),
}
REWARDS = {
    "hps-v2": ("2306.09341",),
    "hps-v2.1": ("2306.09341",),
    "image-reward": ("2304.05977",),
    "pickscore": ("2305.01569",),
    "clip": ("2103.00020", "2104.08718"),
    "open-clip": ("2103.00020", "2104.08718"),
    "aesthetic": ("2210.08402",),
    "jpeg-compressibility": ("2305.13301",),
    "jpeg-incompressibility": ("2305.13301",),
}


def citations(methods: Iterable[str], rewards: Iterable[str], *, lora: bool) -> list[str]:
    """A line of Markdown for each paper, once, in that order. A name that no paper is known for, such as a plug-in's, has none."""
    known = METHODS | EXPO
    ids = [
        *(paper for method in methods for paper in known.get(method, ())),
        *(paper for reward in rewards for paper in REWARDS.get(reward, ())),
        *(LORA if lora else ()),
    ]
    return [_line(paper) for paper in dict.fromkeys(ids)]


def _line(paper: str) -> str:
    authors, title, where = PAPERS[paper]
    return f"{authors}, *{title}*, {where}, [arXiv {paper}](https://arxiv.org/abs/{paper})"
