"""ReFL: the reward's gradient on a one-step prediction of x_0 (Xu et al., NeurIPS 2023, arXiv 2304.05977)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.checks import above_zero, at_least, check, finite, share, zero_or_more
from diffalign.noise import draw_noise
from diffalign.sampling import ddim, denoising_error, rollout, without_some_text
from diffalign.shards import draw_rows, everyone, everyones_prompts, of_scores
from diffalign.types import Context, Loss, Needs, Policy, Prompts, Reward


@dataclass(frozen=True)
class ReFL:
    """`lambda mean(relu(phi - r(x0_hat, c)))` on the x0_hat predicted at one late step of a rollout, and the denoising loss L_pre.

    Everything without guidance, as in the paper. L_pre is on captioned pictures (`--data`), or else on samples that the base model made
    at the start: it keeps the model from drifting, and the authors' public code for Stable Diffusion lacks it.
    """

    reward_weight: float = 1e-3
    """lambda."""
    phi: float = 2.0
    """Rewards above this have no gradient."""
    pretrain_weight: float = 1.0
    """Weight of L_pre; 0 leaves it out."""
    pretrain_batches: int = 8
    """Batches of samples of the base model, where no data is given."""
    drop_text: float = 0.1
    """Share of L_pre's samples that are trained with an empty prompt, for guidance."""
    inference_steps: int = 40
    """Denoising steps of a whole sample."""
    first: int = 30
    """The rollout stops after so many steps or more, and"""
    last: int = 39
    """after so many or less; the next step's prediction is what is scored."""
    eta: float = 1.0
    """Noise of a sampling step: 1 is ancestral sampling, 0 deterministic."""

    needs: ClassVar[Needs] = Needs(
        differentiable_reward=True, data="pictures", data_role="besides", split_by=("accumulate", "pretrain_batches"), in_step=True
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "accumulate": 16,
        "lora": {"rank": 8},
    }

    def __post_init__(self) -> None:
        above_zero(self, "reward_weight")
        finite(self, "phi")
        zero_or_more(self, "pretrain_weight")
        at_least(self, pretrain_batches=1, inference_steps=2)
        most = self.inference_steps - 1
        check(self, "last", 1 <= self.last <= most, f"1 to {most}, below the denoising steps (method.inference_steps)")
        check(self, "first", 1 <= self.first <= self.last, f"1 to {self.last} (method.last)")
        check(self, "eta", 0 <= self.eta <= 1, "a number from 0 to 1")
        share(self, "drop_text")

    def losses(self, policy: Policy, reward: Reward, batch: Prompts, context: Context) -> Iterator[Loss]:
        condition, kernel = policy.encode(batch).unguided(), ddim(self.eta)
        stop = int(torch.randint(self.first, self.last + 1, (), generator=context.rng))
        with torch.no_grad():
            trajectory = rollout(policy, condition, steps=self.inference_steps, kernel=kernel, until=stop, rng=context.rng)
        x_t, now = trajectory.final, policy.path.schedule(self.inference_steps).now[stop]
        x_0, _ = policy.path.split(policy.predict(x_t, now, condition), x_t, now)
        scores = reward(policy.decode(x_0), batch)
        loss = self.reward_weight * (self.phi - scores).relu().mean()
        yield Loss(loss, of_scores(scores, context.processes), update=self.pretrain_weight == 0)
        if self.pretrain_weight > 0:
            x_0, prompts = self._pretrain_batch(policy, batch, context)
            if self.drop_text > 0:
                condition = without_some_text(policy, prompts, self.drop_text, context.rng)
            else:
                condition = policy.encode(prompts).unguided()
            at = policy.path.draw(len(x_0), context.rng)
            error = denoising_error(policy, x_0, draw_noise(x_0.shape, x_0, context.rng), at, condition).mean()
            yield Loss(self.pretrain_weight * error, {"denoising_error": error.detach()})

    def _pretrain_batch(self, policy: Policy, batch: Prompts, context: Context) -> tuple[Tensor, Prompts]:
        """x_0 (B, *latent) and what they answer: the next data, or a draw from the base model's samples."""
        if context.examples is not None:
            examples = context.examples()
            return examples.x_0, examples.prompts
        if "pretrain" not in context.memory:
            context.memory["pretrain"] = self._base_samples(policy, batch, context)
        pool = context.memory["pretrain"]
        rows = draw_rows(len(batch), context.rng, lambda n: torch.randint(len(pool["prompts"]), (n,), generator=context.rng))
        x_0 = pool["x_0"][rows].to(next(policy.module.parameters()).device)
        sources: dict[str, Any] = {name: pool[name][rows] for name in ("image", "mask") if name in pool}
        if "transcript" in pool:
            sources["transcript"] = tuple(pool["transcript"][i] for i in rows.tolist())
        return x_0, Prompts(tuple(pool["prompts"][i] for i in rows.tolist()), **sources)

    @torch.no_grad()
    def _base_samples(self, policy: Policy, batch: Prompts, context: Context) -> dict[str, Any]:
        """Guided samples of the base model, as people use it, and their prompts: those of all processes, the same in each."""
        batches = context.batches(batch, self.pretrain_batches)
        with policy.reference():
            finals = [
                rollout(policy, policy.encode(prompts), steps=self.inference_steps, kernel=ddim(0.0), rng=context.rng).final
                for prompts in batches
            ]
        x_0 = everyone(torch.cat(finals), context.processes, len(batch))
        prompts = everyones_prompts(Prompts.join(batches), context.processes, len(batch), x_0.device)
        pool = {"x_0": x_0.cpu(), "prompts": list(prompts.text), "image": prompts.image, "mask": prompts.mask}
        pool |= {"transcript": None if prompts.transcript is None else list(prompts.transcript)}
        return {name: value for name, value in pool.items() if value is not None}
