"""Which blocks a kernel gets: from a table, and whose, or from its own rule.

Mutations seen to fail: the table of another kind of device, a rule that is never asked, blocks that
do not fit, a choice that `jax.jit` keeps from another target, entries that differ in one field.
"""

import json
from importlib import resources

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AxisType, PartitionSpec

from jaxrec import ops
from jaxrec_kernels import tuning
from jaxrec_kernels.linear_cross_entropy import tiling
from jaxrec_kernels.linear_cross_entropy.tiling import BACKWARD, FORWARD, Blocks, tuned_blocks
from jaxrec_kernels.tuning import lookup, table

SIZES = (25_600, 3_416, 64, 2)
CALL = tiling.call_class(*SIZES, biased=False)
RULE = tiling.blocks_for(*SIZES, FORWARD)
OF_V5E, OF_V6E = Blocks(512, 1152, 128), Blocks(256, 1152, 384)
V5E, V6E = "TPU v5 lite", "TPU v6 lite"


def a_table(chip, *entries):
    listed = [
        {"kernel": kernel, "call": dict(call), "blocks": blocks, "measured": {}}
        for kernel, call, blocks in entries
    ]
    kinds = {"v5e": [V5E, "TPU v5e"], "v6e": [V6E]}[chip]
    return {"chip": chip, "device_kinds": kinds, "entries": listed}


@pytest.fixture
def two_tables(monkeypatch):
    found = {
        "v5e": a_table("v5e", (FORWARD, CALL, OF_V5E._asdict()), (BACKWARD, CALL, None)),
        "v6e": a_table("v6e", (FORWARD, CALL, OF_V6E._asdict())),
    }
    parsed = {chip: table.parse(values, chip) for chip, values in found.items()}
    monkeypatch.setattr(lookup, "tables", lambda: parsed)


def blocks(kernel=FORWARD, sizes=SIZES, biased=False):
    return tuned_blocks(kernel, *sizes, biased=biased)


@pytest.mark.usefixtures("two_tables")
def test_a_known_device_has_its_table_and_an_unknown_one_the_rule():
    assert RULE not in (OF_V5E, OF_V6E)
    for kind, wanted in ((V5E, OF_V5E), ("TPU v5e", OF_V5E), (V6E, OF_V6E), ("TPU v4", RULE)):
        with tuning.compiling_for(kind):
            assert tuning.device_kind() == kind
            assert blocks() == wanted
    # A CPU without a target: the rule's blocks, which are safe anywhere.
    assert tuning.device_kind() is None
    assert blocks() == RULE


@pytest.mark.usefixtures("two_tables")
def test_other_calls_have_the_rule():
    with tuning.compiling_for(V5E):
        # Looked for and not found.
        assert blocks(BACKWARD) == tiling.blocks_for(*SIZES, BACKWARD, V5E)
        # The rule knows the device, too.
        assert blocks(biased=True) == tiling.blocks_for(*SIZES, FORWARD, V5E) != RULE
        for sizes in ((25_600, 3_416, 64, 4), (25_600, 3_416, 128, 2), (25_600, 3_500, 64, 2)):
            assert blocks(sizes=sizes) == tiling.blocks_for(*sizes, FORWARD, V5E)
        # Positions are cut alike, however many.
        assert blocks(sizes=(1_024, 3_416, 64, 2)) == OF_V5E


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": 500},
        {"items": 1100},
        {"chunk": 100},
        {"chunk": 1152},  # a loop of one round
        {"positions": 8192},  # beyond the vector memory
        {"items": 2304},  # fills up too much
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_is_passed_over(wrong):
    unfit = table.parse(a_table("v5e", (FORWARD, CALL, OF_V5E._asdict() | wrong)), "a table")
    with tuning.using(unfit), tuning.looked_up() as lookups:
        assert blocks() == RULE
    assert [x.chip for x in lookups] == [None]


@pytest.mark.usefixtures("two_tables")
def test_a_device_of_the_mesh_is_the_target():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    kinds = []

    def body(x):
        kinds.append(tuning.device_kind())
        return x

    jax.jit(jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()))(1)
    assert set(kinds) == {None}  # of CPUs
    with jax.set_mesh(mesh), tuning.compiling_for(V6E):
        assert tuning.device_kind() == V6E
        assert jax.sharding.get_abstract_mesh().axis_names == ("x",)


@pytest.mark.usefixtures("two_tables")
def test_jit_keeps_no_blocks_of_another_target():
    traced = []

    @jax.jit
    def inner(x):
        traced.append(blocks())
        return x + x

    def f(x):
        return jax.lax.platform_dependent(x, default=lambda x: x, tpu=inner)

    outer = jax.jit(f)
    for kind in (None, V6E, V5E, None, V6E):
        if kind is None:
            outer(1.0)
        else:
            with tuning.compiling_for(kind):
                outer(1.0)
    assert traced == [RULE, OF_V6E, OF_V5E]


@pytest.mark.usefixtures("two_tables")
def test_explain_says_where_blocks_come_from():
    hidden, items = (jax.ShapeDtypeStruct((n, 64), jnp.bfloat16) for n in SIZES[:2])
    labels = jax.ShapeDtypeStruct((SIZES[0],), jnp.int32)

    def reason(target, **options):
        return ops.explain(
            "linear_cross_entropy", hidden, items, labels, target=target, **options
        ).reason

    for kind, wanted in ((V5E, "table for v5e"), (V6E, "table for v6e"), ("TPU v5p", "own rule")):
        assert reason(AbstractDevice(kind, 1, platform="tpu")).endswith(wanted)
    assert reason("tpu").endswith("own rule")
    bias = jax.ShapeDtypeStruct(SIZES[1:2], jnp.float32)
    v5e = AbstractDevice(V5E, 1, platform="tpu")
    assert reason(v5e, bias=bias).endswith("own rule")
    assert "blocks" not in reason("cpu")


GOOD = (FORWARD, CALL, OF_V5E._asdict())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "wanted chip, device_kinds and entries"),
        ({"chip": "v5e", "device_kinds": ["x"]}, "wanted chip, device_kinds and entries"),
        (a_table("v5e") | {"device_kinds": []}, "device_kinds must be names of devices"),
        (a_table("v5e") | {"entries": [{}]}, "entry 0: wanted kernel, call, blocks and measured"),
        (a_table("v5e", ("softmax", CALL, None)), "no kernel 'softmax'; there are linear_cross"),
        (a_table("v5e", (FORWARD, {"items": 3}, None)), "wanted positions, items, width"),
        (a_table("v5e", GOOD, (FORWARD, CALL, None)), "entry 1: there is one for such calls"),
        (a_table("v5e", (FORWARD, CALL, {"chunk": 128})), "wanted positions, items, chunk"),
        (a_table("v5e", (FORWARD, CALL, OF_V5E._asdict() | {"chunk": 0})), "chunk must be an int"),
        (a_table("v5e", (FORWARD, CALL, OF_V5E._asdict() | {"items": 1e3})), "got 1000.0"),
        (a_table("v5e", (FORWARD, CALL | {"biased": True}, None)), "biased must be an integer"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(values, said):
    with pytest.raises(ValueError, match="here") as caught:
        table.parse(values, "here.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_files_are_in_the_package():
    found = resources.files("jaxrec_kernels.tuning")
    names = {x.name for x in found.iterdir() if x.name.endswith(".json")}
    assert names == {"tpu_v5e.json", "tpu_v6e.json"}
    for name in names:
        values = json.loads((found / name).read_text("utf-8"))
        assert name == f"tpu_{values['chip']}.json"
    assert set(table.tables()) == {"v5e", "v6e"}
    assert lookup.table_for(V5E).chip == "v5e"
    assert lookup.table_for(V6E).chip == "v6e"
    assert lookup.table_for(None) is None
