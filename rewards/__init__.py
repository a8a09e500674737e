"""Rewards: one file each, a callable `(media, prompts) -> (B,)` that says what it is. Found by name, imported when asked for."""

if __name__ != "diffalign.rewards":
    raise ImportError(f"{__name__!r} is a folder of diffalign's checkout: import diffalign.rewards instead")
