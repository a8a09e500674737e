"""`diffalign check`."""

from __future__ import annotations

from diffalign.commands.common import plan_of, quiet


def run(arguments: list[str]) -> int:
    quiet()
    resolved = plan_of(arguments, "check")
    if resolved is None:
        return 0
    from diffalign.api import check

    failed = 0
    for finding in check(resolved[0]):
        mark = {True: "ok  ", False: "FAIL", None: "    "}[finding.passed]
        failed += finding.passed is False
        print(f"{mark}  {finding.name}: {finding.text}", flush=True)
    return 1 if failed else 0
