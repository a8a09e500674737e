"""AlignProp: the reward's gradient through a random number of sampling steps (Prabhudesai et al. 2023, arXiv 2310.03739)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator

from diffalign.checks import at_least, check
from diffalign.sampling import ddim, rollout
from diffalign.shards import of_scores
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class AlignProp:
    """`-r(x_0, c)`, differentiated through the last K of the deterministic DDIM steps; K is drawn for each batch.

    By default each step with a graph is checkpointed: only its state is kept, so memory grows by one latent a step.
    """

    truncation: Literal["uniform", "gaussian", "fixed"] = "uniform"
    """K uniform in 1 .. T; T minus a Gaussian around 0.84 T (42 of 50) with deviation 0.1 T; or always k."""
    k: int = 10
    """Steps that the gradient goes through, with truncation fixed."""
    inference_steps: int = 50
    """T, the denoising steps of a sample."""
    checkpointing: bool = True
    """Run the network again in the backward pass instead of keeping its activations: memory flat in K."""
    loss: Literal["reward", "target"] = "reward"
    """reward: `-r`. target: `0.01 |r - 10|`, as in the authors' code for aesthetics."""

    needs: ClassVar[Needs] = Needs(differentiable_reward=True, split_by=("accumulate",), in_step=True)
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "accumulate": 32,
        "lora": {"rank": 4},
    }

    def __post_init__(self) -> None:
        at_least(self, inference_steps=1, k=1)
        if self.truncation == "fixed":
            most = self.inference_steps
            check(self, "k", self.k <= most, f"1 to {most}, the denoising steps (method.inference_steps)")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        k = self._draw(context.rng)
        condition, kernel = policy.encode(batch), ddim(0.0)
        trajectory = rollout(
            policy,
            condition,
            steps=self.inference_steps,
            kernel=kernel,
            grad_steps=k,
            rng=context.rng,
            checkpointing=self.checkpointing,
        )
        scores = reward(policy.decode(trajectory.final), batch)
        loss = -scores if self.loss == "reward" else 0.01 * (scores - 10).abs()
        yield Loss(loss.mean(), of_scores(scores, context.processes) | {"k": float(k)})

    def _draw(self, rng: Generator) -> int:
        """K, the number of steps with a gradient."""
        steps = self.inference_steps
        match self.truncation:
            case "fixed":
                return self.k
            case "uniform":
                return int(torch.randint(1, steps + 1, (), generator=rng))
            case "gaussian":
                cut = (0.84 + 0.1 * float(torch.randn((), generator=rng))) * steps
                return min(max(steps - round(cut), 1), steps)
