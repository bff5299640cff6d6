"""Time that the device itself says it was busy, from a profiler trace."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax


def device_seconds(call: Callable[[], Any], calls: int = 5) -> float | None:
    """Seconds a call that the device was busy with `call`; None where it does not say so.

    A CPU does not. The profiler is no part of what is measured, so whatever it fails with is None.
    """
    if jax.default_backend() == "cpu":
        return None
    with tempfile.TemporaryDirectory(prefix="jaxrec-trace-") as folder:
        try:
            with jax.profiler.trace(folder):
                jax.block_until_ready([call() for _ in range(calls)])
            files = sorted(Path(folder).rglob("*.xplane.pb"))
            busy = busy_seconds(jax.profiler.ProfileData.from_file(str(files[0])))
            return None if busy is None else busy / calls
        except Exception:
            return None


def busy_seconds(profile: Any) -> float | None:
    """Seconds covered by the programs on the first device of a profile, overlaps counted once.

    Where a device has a line of whole programs ("XLA Modules") it is that line's, elsewhere that
    of all its lines together: a GPU has one a stream.
    """
    for plane in profile.planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = {line.name: line for line in plane.lines}
        chosen = [lines["XLA Modules"]] if "XLA Modules" in lines else list(lines.values())
        spans = [
            (event.start_ns, event.start_ns + event.duration_ns)
            for line in chosen
            for event in line.events
        ]
        if spans:
            return _covered(spans) * 1e-9
    return None


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
