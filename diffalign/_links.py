"""`diffalign/pipelines` and `diffalign/rewards`: symlinks in a checkout, folders in a wheel, and an error when neither."""

from __future__ import annotations

import os


def check_links(package: str = os.path.dirname(__file__)) -> None:
    """Raise ImportError, with the mend, where git made text files of the links (`core.symlinks=false`)."""
    broken = [f"diffalign/{name}" for name in ("pipelines", "rewards") if not os.path.isdir(os.path.join(package, name))]
    if broken:
        raise ImportError(
            f"{' and '.join(broken)} should link to the folder of that name beside diffalign/, but this checkout "
            f"was made without symbolic links. Mend it in {os.path.dirname(package)} with\n"
            "    git config core.symlinks true && git checkout -- diffalign/pipelines diffalign/rewards\n"
            "or, where links cannot be made, install a wheel instead of an editable checkout: pip install ."
        )
