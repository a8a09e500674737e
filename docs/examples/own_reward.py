"""A reward of your own in one file: how colourful a picture is (Hasler and Suesstrunk 2003). Name it on the command line,

    diffalign train --method draft --reward docs/examples/own_reward.py:colourful --steps 20
    diffalign score --reward docs/examples/own_reward.py:colourful picture.png

or hand the function to `diffalign.align(reward=colourful)`.
"""

import diffalign


# Without `differentiable=True` it is a score, for ddpo and its like; with it DRaFT and ReFL may follow its gradient, which is
# tried before the training begins.
@diffalign.reward(differentiable=True)
def colourful(images, prompts):  # images (B, 3, H, W) in [0, 1]; prompts.text has B strings; gives (B,), higher is better
    red, green, blue = images.unbind(1)
    opponents = (red - green).flatten(1), ((red + green) / 2 - blue).flatten(1)
    spread = sum(axis.var(1) for axis in opponents)
    mean = sum(axis.mean(1) ** 2 for axis in opponents)
    return (spread + 1e-6).sqrt() + 0.3 * (mean + 1e-6).sqrt()  # the root of 0 has no gradient
