"""From two sides' figures to medians, ratios and a table."""

from statistics import median
from typing import Any

GIBIBYTE = float(1 << 30)


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of both sides, and the peer's divided by ours: above 1, jaxrec needs less."""
    rows = {
        "epoch_seconds": [median(side["training"]["epoch_seconds"]) for side in (ours, peer)],
        "ranking_seconds": [median(side["ranking"]["seconds"]) for side in (ours, peer)],
        "training_peak_bytes": [side["training"]["peak_bytes"] for side in (ours, peer)],
    }
    return {
        name: {"jaxrec": ours_value, "peer": peer_value, "ratio": peer_value / ours_value}
        for name, (ours_value, peer_value) in rows.items()
    }


def table(comparison: dict[str, dict[str, float]], *, peer: str, steps: int, users: int) -> str:
    """The comparison as a Markdown table."""
    rows = (
        ("epoch_seconds", f"an epoch ({steps:,} steps), s", 1.0),
        ("ranking_seconds", f"ranking for {users:,} users, warm, s", 1.0),
        ("training_peak_bytes", "peak memory of training, GiB", GIBIBYTE),
    )
    lines = [f"| median | jaxrec | {peer} | {peer} / jaxrec |", "|---|---:|---:|---:|"]
    for name, title, unit in rows:
        row = comparison[name]
        lines.append(
            f"| {title} | {row['jaxrec'] / unit:.2f} | {row['peer'] / unit:.2f} | "
            f"{row['ratio']:.2f} |"
        )
    return "\n".join(lines)
