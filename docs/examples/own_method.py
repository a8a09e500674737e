"""A method of your own in one file: DRaFT on the worst of a batch. Its fields are its flags:

    diffalign train --method docs/examples/own_method.py:WorstFirst --method.share 0.25 --method.inference-steps 10 --steps 50
    diffalign train --method docs/examples/own_method.py:WorstFirst --help

or `diffalign.align(method="docs/examples/own_method.py:WorstFirst", share=0.25, ...)`.
"""

from dataclasses import dataclass

from diffalign import InputError, ddim, rollout
from diffalign.types import Loss, Needs


@dataclass(frozen=True)
class WorstFirst:
    """The reward's gradient through the last sampling step, from the lowest scores of each batch alone (conditional value at risk)."""

    share: float = 0.5
    """Share of the batch, the lowest scores of it, that the loss is the mean of."""
    inference_steps: int = 50
    """Denoising steps of a sample."""

    # What cannot be done without is checked before a model is loaded; settings of the loop come below the person's own.
    needs = Needs(differentiable_reward=True)
    defaults = {"learning_rate": 2e-3, "batch_size": 16, "guidance_scale": 1.0}  # noqa: RUF012

    def __post_init__(self):
        if not 0 < self.share <= 1:  # said so that NaN is refused too
            raise InputError(f"method.share is {self.share}: give a number above 0, and at most 1.")

    def losses(self, policy, reward, batch, context):
        # Every draw comes from the run's generator, so that a resumed run equals one that was never stopped.
        sampled = rollout(policy, policy.encode(batch), steps=self.inference_steps, kernel=ddim(0.0), grad_steps=1, rng=context.rng)
        scores = reward(policy.decode(sampled.final), batch)
        worst = scores.topk(max(1, round(self.share * len(scores))), largest=False).values
        # One Loss is one optimiser step. A method that takes several on a round of samples yields several.
        yield Loss(-worst.mean(), {"reward": scores.detach().mean(), "reward_worst": worst.detach().mean()})
