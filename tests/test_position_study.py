"""The position study: its arms, what is trained and what is not, and what its files say.

Mutations that these tests were seen to fail for: the reference minus the arm; intervals over lists
instead of users; a full factor read transposed. They are there, too, for an arm that changes two
things, a finished run trained again, and a results file of another config taken.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_sets

import jaxrec
from experiments import plot_taps
from experiments.position_study import Arguments, Data, main, plan
from experiments.positions.arms import ARMS, FACTORS, SCHEMES
from experiments.positions.cells import Cell, Values, find_results, read_values
from experiments.positions.comparison import Outcome, summarize
from experiments.positions.section import section
from experiments.positions.taps import draw_taps, read_taps
from jaxrec.errors import UserError
from jaxrec.evaluation.bootstrap import paired_difference
from jaxrec.models.config import HSTUConfig, PositionalKernelConfig
from jaxrec.training.config import check, load_config, to_dict
from jaxrec.training.interrupt import Interrupted

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
BASE = load_config(EXPERIMENTS / "sasrec.py")


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}")
    else:
        yield prefix, values


def changed(one: Any, other: Any) -> set[str]:
    first, second = dict(leaves(to_dict(one))), dict(leaves(to_dict(other)))
    return {name for name in first if first[name] != second[name] and name != ".name"}


def test_an_arm_changes_one_thing() -> None:
    made = {name: arm.config(BASE, data="d", seed=3) for name, arm in ARMS.items()}
    assert len({config.name for config in made.values()}) == len(ARMS)
    assert len(FACTORS) <= 12
    for name, config in made.items():
        check(config)
        reference = ARMS[name].reference
        if reference is not None:
            wanted = 2 if name == "kernel-full" else 1
            assert len(changed(config, made[reference])) == wanted, name
    positions = {made[arm.name].model.position for arm in SCHEMES}
    assert len(positions) == len(SCHEMES) == 8


@pytest.mark.parametrize(("arm", "file"), [("additive", "sasrec"), ("kernel", "sasrec_kernel")])
def test_arms_with_a_config_file_are_that_config(arm: str, file: str) -> None:
    config = load_config(EXPERIMENTS / f"{file}.py")
    assert ARMS[arm].config(BASE, data=config.data.name, seed=config.training.seed) == config


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="hstu has no choice of position"):
        ARMS["none"].config(replace(BASE, model=HSTUConfig()), data="d", seed=0)


def test_what_is_compared_first_is_trained_first() -> None:
    sets = [Data(name, name, "h") for name in ("amazon-2014-beauty", "movielens-1m")]
    cells = plan(Arguments(), BASE, sets)
    assert len(cells) == 3 * 8 + 8 + len(FACTORS)
    assert [c.seed for c in cells[:24]] == [0] * 8 + [1] * 8 + [2] * 8
    assert {c.dataset for c in cells[24:32]} == {"movielens-1m"}
    assert [c.arm for c in cells[32:]] == list(FACTORS)
    cells = plan(Arguments(arms=("none", "kernel-full"), seeds=(7,)), BASE, sets)
    assert [str(c) for c in cells][:2] == [
        "amazon-2014-beauty none seed 7",
        "amazon-2014-beauty kernel-full seed 7",
    ]
    assert len(cells) == 4


@contextmanager
def quickly_compiled() -> Iterator[None]:
    """Half the time of a run that compiles far more than it computes."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """Two arms: the session's run used again, and one trained after it was interrupted."""
    folder = tmp_path_factory.mktemp("study")
    small_sets.trained_run()
    arguments = Arguments(
        data=(str(small_sets.shop().path),),
        out=folder / "runs",
        arms=("additive", "kernel"),
        config=small_sets.config_file(folder / "base.py", small_sets.small_config()),
        results=folder / "results",
        reuse=(small_sets.base_dir(),),
    )
    real, asked = jaxrec.fit, []

    def fit(config: Any, *args: Any, **options: Any) -> Any:
        asked.append(config.name)
        if len(asked) == 1:
            raise Interrupted(15, "stopped at step 1 by a signal")
        return real(config, *args, **options)

    with pytest.MonkeyPatch.context() as patch, small_sets.compiled_once(), quickly_compiled():
        patch.setattr(jaxrec, "fit", fit)
        patch.setattr(jax, "clear_caches", lambda: None)  # Other tests go on with theirs.
        assert main(arguments) == 128 + 15
        assert main(arguments) == 0
    assert asked == ["small_kernel", "small_kernel"]
    return arguments


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("trained")


def test_what_has_ended_is_not_trained_again(
    study: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jaxrec, "fit", never)
    assert main(study) == 0
    out = capsys.readouterr().out
    assert "[1/2] shop additive seed 0: has ended" in out
    assert "[2/2] shop kernel seed 0: has ended" in out
    assert "block 1, head 1, u on the logits: " in out
    assert "| NDCG@10 minus |" in out


def test_the_study_file_says_what_the_runs_say(study: Arguments) -> None:
    written = json.loads((study.results / "positions" / "study-shop.json").read_text())
    additive, kernel = written["arms"]
    assert (additive["arm"], kernel["arm"]) == ("additive", "kernel")
    ndcg = {}
    folders = {"small": small_sets.trained_run(), "small_kernel": study.out / "shop/kernel-seed0"}
    for arm, (name, folder) in zip(("additive", "kernel"), folders.items(), strict=True):
        run = folder / "results.json"
        file = study.results / "positions" / f"{name}-shop-seed0.json"
        assert json.loads(run.read_text()) == json.loads(file.read_text())
        ndcg[arm] = json.loads(run.read_text())["metrics"]["test"]["ndcg@10"]
    assert kernel["means"]["ndcg@10"] == ndcg["kernel"]
    assert kernel["paired"]["seeds"] == [0]
    difference = kernel["paired"]["ndcg@10"]
    assert difference["mean"] == pytest.approx(ndcg["kernel"] - ndcg["additive"], abs=1e-9)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert additive["paired"] is None
    low, high = additive["intervals"]["ndcg@10"]
    assert low <= ndcg["additive"] <= high
    png = study.results / "positions" / "taps-shop-kernel-seed0.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_runs_in_other_folders_are_used_again(
    study: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxrec, "fit", never)
    runs = (study.out / "shop", *study.reuse)
    other = replace(study, out=tmp_path / "out", results=tmp_path / "r", reuse=runs, taps=False)
    with small_sets.compiled_once(), quickly_compiled():
        assert main(other) == 0
    mine, theirs = (
        json.loads((a.results / "positions" / "study-shop.json").read_text())
        for a in (study, other)
    )
    assert mine == theirs


def test_a_results_file_alone_counts_but_is_not_paired(
    study: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jaxrec, "fit", never)
    results = small_sets.copy_of(study.results, tmp_path / "results")
    elsewhere = replace(study, out=tmp_path / "out", reuse=(), taps=False, results=results)
    assert main(elsewhere) == 0
    assert "seed 0: has its results and values by user" in capsys.readouterr().out
    written = results / "positions" / "study-shop.json"
    assert json.loads(written.read_text())["arms"][1]["paired"] is not None
    (results / "positions" / "values" / "shop-kernel-seed0.npz").unlink()
    assert main(elsewhere) == 0
    assert "not paired (--again trains it)" in capsys.readouterr().out
    assert json.loads(written.read_text())["arms"][1]["paired"] is None
    with pytest.raises(AssertionError, match="trained"):
        main(replace(elsewhere, again=True))
    with pytest.raises(AssertionError, match="trained"):
        main(replace(elsewhere, seeds=(1,)))
    # The run folder has what the values are made from.
    assert main(replace(study, results=results)) == 0
    assert json.loads(written.read_text())["arms"][1]["paired"] is not None


def test_a_run_that_fails_does_not_end_the_others(
    study: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(*_: Any, **__: Any) -> Any:
        raise UserError("not finite at step 3")

    monkeypatch.setattr(jaxrec, "fit", fit)
    assert main(replace(study, out=tmp_path / "out", results=tmp_path / "r", reuse=())) == 1
    error = capsys.readouterr().err
    assert "error: shop additive seed 0: not finite at step 3" in error
    assert "error: shop kernel seed 0: not finite at step 3" in error
    assert "2 runs failed" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("sinusoidal",)}, "--arms sinusoidal: no such arm; there are additive, "),
        ({"data": ("nothing-here",)}, "nothing-here"),
        ({"reuse": (Path("none"),)}, "--reuse none: no such folder"),
        ({"arms": ("kernel-band-16",)}, "model.kernel.band (16) must be at most data.max_length"),
    ],
)
def test_what_cannot_be_ends_in_one_line(
    study: Arguments, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(replace(study, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_which_runs_are_the_same() -> None:
    config = ARMS["kernel"].config(BASE, data="d", seed=1)
    cell = Cell(ARMS["kernel"], "d", "hash", config)
    training = config.training

    def matches(**changes: Any) -> bool:
        return cell.matches(json.loads(json.dumps(to_dict(replace(config, **changes)))), "hash")

    assert matches()
    assert matches(name="x", published={}, data=replace(config.data, name="/elsewhere/d"))
    assert matches(training=replace(training, log_every=7, tensorboard=True))
    assert not matches(training=replace(training, seed=0))
    assert not matches(training=replace(training, epochs=3))
    assert not matches(model=replace(config.model, position="additive"))
    assert not cell.matches(to_dict(config), "another hash")
    assert not cell.matches(to_dict(config) | {"unknown": 1}, "hash")


@pytest.mark.parametrize("data", ["amazon-2014-beauty", "movielens-1m"])
def test_results_that_are_there_already_are_arms(data: str) -> None:
    for arm, name in (("additive", "sasrec"), ("kernel", "sasrec_kernel")):
        file = EXPERIMENTS / "results" / f"{name}-{data}-seed0.json"
        results = json.loads(file.read_text())
        config = ARMS[arm].config(BASE, data=data, seed=0)
        cell = Cell(ARMS[arm], data, results["data_hash"], config)
        assert find_results(cell, EXPERIMENTS / "results") == results
        assert find_results(cell._replace(data_hash="0" * 64), EXPERIMENTS / "results") is None


def test_values_of_another_config_or_damaged_ones_are_none(study: Arguments) -> None:
    base = load_config(study.config)
    data = Data(study.data[0], "shop", small_sets.shop().hash)
    (cell, _) = plan(study, base, [data])
    assert read_values(cell, study.results) is not None
    longer = replace(cell.config, training=replace(cell.config.training, epochs=2))
    assert read_values(cell._replace(config=longer), study.results) is None
    file = cell.values_file(study.results)
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-40])
        assert read_values(cell, study.results) is None
    finally:
        file.write_bytes(whole)


def outcome(arm: str, seed: int, ndcg: Any, users: Any = None) -> Outcome:
    values = np.asarray(ndcg, np.float64)
    metrics = {"hr@10": float(values.mean()), "ndcg@10": float(values.mean()), "coverage@10": 0.5}
    results = {
        "metrics": {"test": metrics},
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
        "epochs": 3,
        "step": 30,
        "seconds": 7200.0,
    }
    config = ARMS[arm].config(BASE, data="shop", seed=seed)
    users = np.arange(len(values)) if users is None else users
    kept = Values(users, {"hr@10": values, "ndcg@10": values})
    return Outcome(Cell(ARMS[arm], "shop", "f" * 64, config), results, kept)


def test_pairs_are_of_the_same_seed_and_user() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(300)
    runs = {(arm, s): 0.1 * rng.random(300) + 0.8 * easy for arm in ARMS for s in (0, 1, 2)}
    for seed in (0, 1):
        runs["kernel", seed] += 0.05
    known = [outcome("additive", s, runs["additive", s]) for s in (0, 1, 2)]
    known += [outcome("kernel", s, runs["kernel", s]) for s in (0, 1)]
    known += [outcome("kernel-full", 2, runs["kernel-full", 2])]
    found = {a["arm"]: a for a in summarize(known, level=0.95, resamples=200)["arms"]}
    paired = found["kernel"]["paired"]
    assert paired["seeds"] == [0, 1]
    by_seed = [(runs["kernel", s] - runs["additive", s]).mean() for s in (0, 1)]
    assert paired["ndcg@10"]["by_seed"] == pytest.approx(by_seed)
    # A user is drawn with the lists of both seeds: as the mean of both, user by user.
    wanted = paired_difference(
        (runs["kernel", 0] + runs["kernel", 1]) / 2,
        (runs["additive", 0] + runs["additive", 1]) / 2,
        resamples=200,
    )
    got = paired["ndcg@10"]
    assert got["mean"] == pytest.approx(np.mean(by_seed))
    assert (got["low"], got["high"]) == pytest.approx((wanted.low, wanted.high))
    assert got["low"] > 0.03
    assert paired["coverage@10"] == {"by_seed": [0.0, 0.0], "mean": 0.0}
    # No seed of its reference.
    assert found["kernel-full"]["paired"] is None
    with pytest.raises(UserError, match="judged on other users"):
        summarize(
            [known[0], outcome("kernel", 0, runs["kernel", 0], np.arange(300) + 1)],
            level=0.95,
            resamples=10,
        )


def test_results_page(tmp_path: Path) -> None:
    assert section(tmp_path, tmp_path) == ""
    rng = np.random.default_rng(0)
    known = [outcome(a, s, rng.random(50)) for a in ("additive", "kernel") for s in (0, 1)]
    known.append(outcome("kernel-full", 0, rng.random(50))._replace(values=None))
    study = summarize(known, level=0.95, resamples=50)
    (tmp_path / "study-shop.json").write_text(json.dumps(study))
    (tmp_path / "taps-shop-kernel-seed0.png").write_bytes(b"")
    text = section(tmp_path, tmp_path.parent)
    assert "### shop" in text
    assert "One factor at a time:" in text
    kernel = study["arms"][1]
    (row,) = (line for line in text.splitlines() if line.startswith("| positional kernel"))
    low, high = kernel["intervals"]["ndcg@10"]
    assert f"{kernel['means']['ndcg@10']:.4f} [{low:.4f}, {high:.4f}] ±" in row
    assert f"additive: {kernel['paired']['ndcg@10']['mean']:+.4f} [" in row
    assert "| full on both | 1 |" in text
    assert "kernel: not paired" in text
    assert "5 runs, 10.0 hours of training; cpu, JAX 0.10.2, data ffffffffffff" in text
    assert f"]({tmp_path.name}/taps-shop-kernel-seed0.png)" in text


def test_taps_by_lag(tmp_path: Path) -> None:
    taps = {
        "blocks.0.kernel.logits": jnp.array([[1.0, 0.0, -0.5, 0.1]]),
        "blocks.0.kernel.values": jnp.array([[1.0, 0.2, 0.0, 0.0]]),
        "blocks.0.query.kernel": jnp.zeros((2, 2)),
    }
    u, values = read_taps(taps, PositionalKernelConfig(per_head=True))
    assert (u.block, u.head, u.factor) == (0, 0, "logits")
    assert u.mean.tolist() == pytest.approx([1.0, 0.0, -0.5, 0.1])
    assert (u.half_lag, values.half_lag) == (2, 1)
    assert (
        str(u) == "block 1, head 1, u on the logits: +1.000 at lag 0, half of the rest within lag 2"
    )

    upper = jnp.array([[1.0, 2.0, 7.0], [9.0, 1.0, 4.0], [9.0, 9.0, 1.0]])
    full = {"blocks.1.kernel.logits": upper, "blocks.1.kernel.values": upper.T}
    for one in read_taps(full, PositionalKernelConfig(logits="full", values="full")):
        assert one.mean.tolist() == [1.0, 3.0, 7.0]
        assert (one.low[1], one.high[1]) == pytest.approx((2.2, 3.8))
    assert (
        read_taps({"blocks.0.kernel.logits": jnp.array([1.0])}, PositionalKernelConfig())[
            0
        ].half_lag
        is None
    )
    with pytest.raises(UserError, match="no positional kernel"):
        read_taps({"blocks.0.query.kernel": upper}, PositionalKernelConfig())
    draw_taps(read_taps(full, PositionalKernelConfig("full", "full")), tmp_path / "t.png", "title")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_draws_taps(
    study: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(run: Path, out: str) -> int:
        return plot_taps.main(plot_taps.Arguments(run, tmp_path / out))

    kernel = study.out / "shop" / "kernel-seed0"
    assert command(kernel, "taps.png") == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert (tmp_path / "taps.png").is_file()
    assert command(small_sets.trained_run(), "other.png") == 2
    assert "this run has no positional kernel" in capsys.readouterr().err
    assert command(kernel, "taps.svg") == 2
    assert not (tmp_path / "other.png").exists()
