"""Every kind of damage to every file of a prepared set and of a checkpoint, one at a time."""

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.damage import Impossible, Spoil, kinds
from benchmarks.faults.ending import differences, ending
from jaxrec._fit import fit
from jaxrec.data.paths import MANIFEST
from jaxrec.errors import UserError
from jaxrec.training.checksums import CHECKSUMS
from jaxrec.training.config import Experiment

# What Orbax writes when the checksums are made already: nothing reads it.
NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")


@dataclass(frozen=True)
class Trial:
    """One damage and what came of it.

    Attributes:
      group: `data set` or `checkpoint`.
      file: by path in the set or in the checkpoint.
      kind: of the damage.
      outcome: `refused` in one line; `passed over` for the checkpoint before, in one line, with
        the same end; `harmless`: not noticed, with the same end, for a known reason; or
        `undetected`, which is a failure.
      told: the line, the reason, or what went wrong.
    """

    group: str
    file: str
    kind: str
    outcome: str
    told: str


@dataclass(frozen=True)
class Scene:
    """Where damage is done: what is whole, and where copies of it are used.

    Attributes:
      config: the training.
      whole: what it comes to when nothing is spoilt (`ending`).
      data: the whole set, and the path where the config looks for it.
      other_data: another set of the same form.
      begun: a run folder of the same training, ended sooner.
      folder: for the copies.
    """

    config: Experiment
    whole: dict[str, Any]
    data: tuple[Path, Path]
    other_data: Path
    begun: Path
    folder: Path


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return _checkpoints(run)[-1]


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=_step)


def _step(path: Path) -> int:
    return int(path.name)


def files_of(folder: Path) -> list[str]:
    """Paths of all files in a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def in_turn(files: list[str], names: list[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """All pairs of file and kind, so ordered that the first ones hold each about as often."""
    rest = [(file, kind) for file in files for kind in names]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    used: Counter[str] = Counter()
    ordered = []
    while rest:
        pair = min(rest, key=lambda p: used[f"file {p[0]}"] + used[f"kind {p[1]}"])
        rest.remove(pair)
        used.update((f"file {pair[0]}", f"kind {pair[1]}"))
        ordered.append(pair)
    return ordered


def run_trials(
    scene: Scene, count: int, *, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Half of the trials on the set, half on the newest checkpoint.

    Args:
      scene: what to spoil.
      count: how many; 0 for every kind on every file.
      seed: of what is chosen, and of the damage.
      tell: takes a line of progress.

    Returns:
      `count`, numbers `by_outcome` of both groups, and all of them in `each`.
    """
    trials: list[Trial] = []
    for group, number in (("data set", count - count // 2), ("checkpoint", count // 2)):
        rng = np.random.default_rng([seed, len(trials)])
        for trial in _group(scene, group, rng):
            trials.append(trial)
            of_group = sum(t.group == group for t in trials)
            tell(f"{group}, {of_group}: {trial.file}, {trial.kind}: {trial.outcome}")
            if of_group == number:
                break
    outcomes = ("refused", "passed over", "harmless", "undetected")
    return {
        "count": len(trials),
        "by_outcome": {
            group: {o: sum((t.group, t.outcome) == (group, o) for t in trials) for o in outcomes}
            for group in ("data set", "checkpoint")
        },
        "each": [asdict(trial) for trial in trials],
    }


def _group(scene: Scene, group: str, rng: np.random.Generator) -> Iterator[Trial]:
    one = _data_trial if group == "data set" else _checkpoint_trial
    folder = scene.data[0] if group == "data set" else newest(scene.begun)
    for file, kind in in_turn(files_of(folder), list(kinds(lambda path: None)), rng):
        with contextlib.suppress(Impossible):
            yield Trial(group, file, kind, *one(scene, file, kind, rng))


def _data_trial(scene: Scene, file: str, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    whole, used = scene.data
    _fresh(whole, used)
    spoil = kinds(lambda path: scene.other_data / path.name)[kind]
    try:
        spoilt = _spoil(spoil, used / file, rng)
        out = scene.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return _outcome(scene, out, lambda: reads_the_same(whole / file, spoilt))
    finally:
        _fresh(whole, used)


def _checkpoint_trial(
    scene: Scene, file: str, kind: str, rng: np.random.Generator
) -> tuple[str, str]:
    out = scene.folder / "run"
    _fresh(scene.begun, out)
    whole, used = newest(scene.begun), newest(out)
    before = _checkpoints(scene.begun)[-2]

    def of_the_one_before(path: Path) -> Path | None:
        # Files of arrays have random names: the one in the same place counts.
        folder = path.relative_to(used).parent
        own = [p.name for p in sorted(whole.joinpath(folder).iterdir()) if p.is_file()]
        others = [p for p in sorted(before.joinpath(folder).iterdir()) if p.is_file()]
        same = [p for p in others if p.name == path.name]
        place = own.index(path.name)
        return same[0] if same else others[place] if place < len(others) else None

    spoilt = _spoil(kinds(of_the_one_before)[kind], used / file, rng)

    def reason() -> str | None:
        if file in NOT_READ and spoilt.parent.joinpath(CHECKSUMS).is_file():
            return "nothing reads it"
        return reads_the_same(whole / file, spoilt)

    return _outcome(scene, out, reason)


def _spoil(spoil: Spoil, path: Path, rng: np.random.Generator) -> Path:
    spoil(path, rng)
    return path


def _outcome(scene: Scene, out: Path, reason: Callable[[], str | None]) -> tuple[str, str]:
    """Trains to the end, if that is let happen; `reason` tells why damage may go unnoticed."""
    why = reason()
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        try:
            fit(scene.config, out)
        except UserError as error:
            one_line = "\n" not in str(error)
            return ("refused", str(error)) if one_line else ("undetected", f"lines: {error}")
        except Exception as error:
            return "undetected", f"ended in {type(error).__name__}: {error}"
    told = [line for line in stream.getvalue().splitlines() if "cannot be read" in line]
    found = differences(scene.whole, ending(out))
    if found:
        return "undetected", f"differs in {', '.join(found)}"
    if told:
        return "passed over", told[0]
    return ("undetected", "the same end, for no known reason") if why is None else ("harmless", why)


def reads_the_same(whole: Path, spoilt: Path) -> str | None:
    """Why a damaged JSON file may go unnoticed; None where it may not."""
    if whole.name not in (MANIFEST, CHECKSUMS):
        return None
    try:
        before, now = (json.loads(p.read_bytes()) for p in (whole, spoilt))
    except (OSError, ValueError):
        return None
    if before == now:
        return "its entries read the same"
    own_hash = "manifest_hash"
    if own_hash not in now and {k: v for k, v in now.items() if k in before} == {
        k: v for k, v in before.items() if k != own_hash
    }:
        return "its entries read the same, without the hash that tells"
    return None


def _fresh(whole: Path, used: Path) -> None:
    shutil.rmtree(used, ignore_errors=True)
    shutil.copytree(whole, used)
