"""Training in two processes: what one process would give, runs that go between them, failures.

A run of twelve steps is begun by one process, goes on in two until one of them gets a SIGTERM, and
is ended in two ways: by one process, and by two with another mesh. Both are held against a run that
one process did alone.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from process_pair import pair
from small_sets import compiled_once, config_file, small_config

import jaxrec
from jaxrec.cli.main import main
from jaxrec.devices import make_mesh
from jaxrec.errors import UserError
from jaxrec.training.config import MeshConfig
from jaxrec.training.loop import train
from jaxrec.training.run_folder import RunFolder
from jaxrec.training.run_lock import alone_in

STEPS, EPOCHS = 4, 3

# While process 1 reads batch 5.
TERMINATE = """
import os, signal, sys
from jaxrec.data.batches import TrainingBatches

original = TrainingBatches.__getitem__

def counting(self, index):
    if index == 5 and sys.argv[-1] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, index)

TrainingBatches.__getitem__ = counting
"""

# Process 1 alone fails, where the first does not look what has become of it.
FAIL = """
import jax
from jaxrec.data.batches import TrainingBatches
from jaxrec.errors import UserError

def failing(self, *arguments, **options):
    if jax.process_index() == 1:
        raise UserError("the disk of process 1 is gone")
    original(self, *arguments, **options)

original, TrainingBatches.__init__ = TrainingBatches.__init__, failing
"""

# A program of the user's own: connect, fit, and then go through what is refused.
PROGRAM = """
import json, sys
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
here = sys.argv[3]

import jaxrec
from jaxrec import processes
from jaxrec.cli.main import main
from jaxrec.devices import make_mesh
from jaxrec.training.config import load_config

processes._GRACE_SECONDS = 0.5
mesh = make_mesh(2, 2)
owners = [[device.process_index for device in row] for row in mesh.devices]
run = jaxrec.fit(
    load_config(here + "/other.py"), here + "/run", results_folder=here + "/results"
)
codes = [
    main(["train", here + "/other.py", "--out", here + "/" + folder])
    for folder in ("thesis", "held")
]
print(json.dumps({"owners": owners, "step": run.step, "codes": codes}), flush=True)
code = main(["train", here + "/fail.py", "--out", here + "/failed", "--quiet"])
print("the code of the failure:", code, flush=True)
raise SystemExit(code)
"""


# Each process has half of the item table, and of its padding.
SPANNED = """
import json, sys
import jax
import numpy as np

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
here = sys.argv[3]

import jaxrec
from jaxrec import processes
from jaxrec.devices import make_mesh
from jaxrec.training.config import MeshConfig, load_config

# Three rows of each part at a time; the last three overlap with those before.
processes._BLOCK_BYTES = 400
fetched = processes.multihost_utils.process_allgather
sizes = []

def watched(array, **options):
    sizes.append(array.nbytes)
    return fetched(array, **options)

processes.multihost_utils.process_allgather = watched
config = load_config(here + "/spanned.py")
run = jaxrec.fit(config, here + "/run")
table = run.parameters["item_embedding"]
again = jaxrec.load(here + "/run", mesh=MeshConfig(1, 4))
sizes.clear()
vectors = again.item_vectors()
print(
    json.dumps(
        {
            "step": run.step,
            "here": [list(s.data.shape) for s in table.addressable_shards],
            "vectors": vectors.tolist(),
            "sizes": sizes,
            "ndcg": again.evaluate().model["ndcg@10"],
            "items": [r.item_id for r in again.recommend(101, k=5)],
            "cached": run.evaluate().model["ndcg@10"],
        }
    ),
    flush=True,
)
"""


def config(data=1, model=1, epochs=EPOCHS):
    found = small_config(
        model__dropout=0.0, training__epochs=epochs, training__log_every=2, data__prefetch=1
    )
    return replace(found, mesh=MeshConfig(data, model))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with four devices does."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    jaxrec.fit(config(4), folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """An epoch by one process, then two with the same mesh until SIGTERM: the folder, the ends."""
    base = tmp_path_factory.mktemp("stopped")
    train(config(4, epochs=1), base / "run", show_progress=False)
    path = str(config_file(base / "config.py", config(4), TERMINATE))

    def words(number, coordinator):
        connection = ["--coordinator", coordinator, "--processes", "2", "--process", str(number)]
        command = ["train", path, "--out", str(base / "run"), *connection]
        return ["-m", "jaxrec.cli.main", *command]

    with pair(base / "printed", words) as both:
        return base / "run", both.wait()


def assert_same_run(folder, wanted):
    lines, others = (RunFolder(f).read_metrics() for f in (folder, wanted))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "gradient_norm"):
            if name in line:
                np.testing.assert_allclose(line[name], other[name], rtol=1e-4)
        if "validation" in line:
            for name, value in line["validation"].items():
                np.testing.assert_allclose(value, other["validation"][name], atol=0.03)
    exact = jaxrec.load(wanted, checkpoint="last").parameters
    for name, value in jaxrec.load(folder, checkpoint="last").parameters.items():
        np.testing.assert_allclose(value, exact[name], atol=2e-4, err_msg=name)


# What Gloo prints from several threads, piece by piece: pieces of two lines can stand in one.
GLOO = re.compile(
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : "
)


def of_jaxrec(printed):
    """The lines that are not of the libraries underneath."""
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if GLOO.sub("", line).strip()]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(stopped):
    folder, ends = stopped
    assert [end.code for end in ends] == [128 + signal.SIGTERM] * 2, ends
    steps = sorted(int(p.name) for p in RunFolder(folder).checkpoints.iterdir())
    # A point of the curve, or the end of the epoch.
    assert steps[-1] in (6, 8)
    points = [p["step"] for p in RunFolder(folder).read_metrics() if "loss" in p]
    assert points == list(range(2, steps[-1] + 1, 2))
    line = f"jaxrec: stopped at step {steps[-1]} by a signal; the same command continues from there"
    told = [of_jaxrec(end.errors) for end in ends]
    assert told[0][0] == "continuing at step 4, epoch 2"
    assert [lines[-1] for lines in told] == [line] * 2
    assert told[1] == [line]
    assert not any(of_jaxrec(end.output) for end in ends), [end.output for end in ends]


@pytest.mark.slow
def test_one_process_continues_what_two_have_begun(stopped, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    train(config(4), folder, show_progress=False)
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_two_processes_with_another_mesh_continue_and_failures_end_both(stopped, alone, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    config_file(tmp_path / "other.py", config(2, 2))
    config_file(tmp_path / "fail.py", config(2, 2), FAIL)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("important")
    (tmp_path / "program.py").write_text(PROGRAM)

    def words(number, coordinator):
        return [str(tmp_path / "program.py"), coordinator, str(number), str(tmp_path)]

    with alone_in(tmp_path / "held"), pair(tmp_path / "printed", words) as both:
        ends = both.wait()

    # The run.
    assert_same_run(tmp_path / "run", alone)
    results, wanted = (RunFolder(f).read_results() for f in (tmp_path / "run", alone))
    for name in ("ndcg@10", "hr@10"):
        value, exact = (r["metrics"]["test"][name] for r in (results, wanted))
        assert value == pytest.approx(exact, abs=0.03)
    (copy,) = (tmp_path / "results").iterdir()
    assert json.loads(copy.read_text()) == results
    printed = [json.loads(next(x for x in e.output.splitlines() if x[0] == "{")) for e in ends]
    assert printed[0] == printed[1]
    assert printed[0]["step"] == results["step"]
    # The item table is split within a process.
    assert printed[0]["owners"] == [[0, 0], [1, 1]]

    # What is refused.
    assert [end.code for end in ends] == [2, 2]
    assert printed[0]["codes"] == [2, 2]
    first, second = ([x for x in of_jaxrec(e.errors) if x.startswith("jaxrec: ")] for e in ends)
    other = "jaxrec: process 0 stopped: see its message"
    assert "thesis: not a run folder" in first[0]
    assert "held: another process is training into it" in first[1]
    assert second[:2] == [other, other]
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]
    assert not list((tmp_path / "held").iterdir())

    # What goes wrong in one process alone, while the other waits for it.
    assert first[2:] == ["jaxrec: process 1 stopped: see its message"]
    assert second[2:] == ["jaxrec: the disk of process 1 is gone"]
    # The first printed what training reports, the second nothing else.
    assert of_jaxrec(ends[1].errors) == second


@pytest.mark.slow
def test_a_table_that_spans_both_processes_is_trained_and_judged_by_both(stopped, alone, tmp_path):
    """30 items over four devices: padded rows are saved from both, and restored into both."""
    shutil.copytree(stopped[0], tmp_path / "run")
    config_file(tmp_path / "spanned.py", config(1, 4))
    (tmp_path / "program.py").write_text(SPANNED)

    def words(number, coordinator):
        return [str(tmp_path / "program.py"), coordinator, str(number), str(tmp_path)]

    with pair(tmp_path / "printed", words) as both:
        ends = both.wait()
    assert [end.code for end in ends] == [0, 0], ends
    assert_same_run(tmp_path / "run", alone)
    printed = [json.loads(next(x for x in e.output.splitlines() if x[0] == "{")) for e in ends]
    assert printed[0] == printed[1]
    told = printed[0]
    assert told["here"] == [[8, 8]] * 2
    assert told["sizes"] == [4 * 3 * 8 * 4] * 3
    # What one process reads, on one device.
    run = jaxrec.load(tmp_path / "run")
    assert told["step"] == run.step
    np.testing.assert_array_equal(np.float32(told["vectors"]), run.item_vectors())
    assert told["items"] == [r.item_id for r in run.recommend(101, k=5)]
    wanted = RunFolder(tmp_path / "run").read_results()["metrics"]["test"]["ndcg@10"]
    assert told["ndcg"] == told["cached"] == wanted
    assert wanted == pytest.approx(run.evaluate().model["ndcg@10"], abs=0.03)


def test_the_mesh_leaves_no_process_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    message = "is 1 x 2, but the 4 processes have 8 devices and must use all of them"
    with pytest.raises(UserError, match=message):
        make_mesh(1, 2)
    assert dict(make_mesh(0, 2).shape) == {"data": 4, "model": 2}


def test_a_process_that_waits_in_vain_says_so(tmp_path):
    path = config_file(tmp_path / "config.py", config())
    connection = ["--coordinator", "localhost:9", "--processes", "2", "--process", "1"]
    words = ["train", str(path), "--out", str(tmp_path / "run"), *connection]
    child = subprocess.run(
        [sys.executable, "-m", "jaxrec.cli.main", *words, "--connect-timeout", "1"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert child.returncode == 2
    assert child.stderr == (
        "jaxrec: train: the processes have not met at localhost:9 within 1 seconds; all of them "
        "must be started, and reach process 0 there (--connect-timeout waits longer)\n"
    )
    assert not (tmp_path / "run").exists()


BAD_OPTIONS = {
    "one of three": (["--coordinator", "localhost:1"], "missing: --processes, --process"),
    "two of three": (["--processes", "2", "--process", "1"], "missing: --coordinator"),
    "out of range": (
        ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
        "0 to 1",
    ),
    "below zero": (
        ["--coordinator", "localhost:1", "--processes", "2", "--process", "-1"],
        "0 to 1",
    ),
    "no processes": (
        ["--coordinator", "localhost:1", "--processes", "0", "--process", "0"],
        "--processes must be positive, got 0",
    ),
    "no port": (["--coordinator", "host", "--processes", "2", "--process", "0"], "is HOST:PORT"),
    "no such port": (
        ["--coordinator", "host:65536", "--processes", "2", "--process", "0"],
        "is HOST:PORT",
    ),
    "no host": (
        ["--coordinator", "no-such-host.invalid:1", "--processes", "2", "--process", "1"],
        "no host no-such-host.invalid",
    ),
    "both ways": (["--distributed", "--process", "0"], "--distributed finds out what --process"),
    "no time": (["--distributed", "--connect-timeout", "0"], "--connect-timeout must be positive"),
}


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(tmp_path, capsys, options, named):
    path = config_file(tmp_path / "config.py", config())
    assert main(["train", str(path), "--out", str(tmp_path / "run"), *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxrec: train: --")
    assert named in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_told(tmp_path, capsys):
    path = config_file(tmp_path / "config.py", config())
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        connection = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", "0"]
        assert main(["train", str(path), "--out", str(tmp_path / "run"), *connection]) == 2
    assert capsys.readouterr().err == (
        f"jaxrec: train: --coordinator: cannot listen on port {port} (Address already in use); "
        "choose another\n"
    )


def test_what_jax_refuses_is_told(tmp_path, capsys, monkeypatch):
    words = ["train", str(config_file(tmp_path / "config.py", config())), "--out", "run"]
    with monkeypatch.context() as patched:
        for error, named in (
            (ValueError("coordinator_address should be defined."), "finds no cluster here"),
            (RuntimeError("called twice"), "cannot be connected: called twice"),
        ):

            def refuse(*arguments, error=error, **options):
                raise error

            patched.setattr(jax.distributed, "initialize", refuse)
            assert main([*words, "--distributed"]) == 2
            assert named in capsys.readouterr().err
