"""benchmarks/tpu: the parser on listings, and a kernel that is really compiled."""

import dataclasses
import pathlib
import tempfile

import pytest

from benchmarks import results, tpu_schedule
from benchmarks.tables import schedule_best_table, schedule_table
from benchmarks.tpu import compiler, listing
from benchmarks.tpu.cost import as_json, cost
from benchmarks.tpu.kernels import Blocks
from moc_jax.attention.pallas_tpu import flash, flash_backward

FOLDER = pathlib.Path(__file__).parent / "listings"
HEAD = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""


@pytest.fixture(scope="module")
def excerpt():
    """Some bundles of splash attention's forward kernel (512 queries, 1024 keys) on v5p, and their slots."""
    return tuple((FOLDER / f"excerpt-{name}.txt").read_text() for name in ("bundles", "slots"))


def test_excerpt(excerpt):
    found = listing.read(*excerpt, granule=32)
    # What two `pl.when` guard around it, 0x158 to 0x21e and 0xc07 to 0xd3f, is no part of a step.
    assert found.conditional_cycles == (3, 4)
    assert found.tile_cycles == 24  # 0x236 to 0xbb8
    assert found.step_cycles == 53 - 3 - 4  # 0x80 to 0xd8e
    assert found.bytes_in == (2 * 1024 * 128, 2 * 512 * 128, 2 * 1024 * 128)  # k, q, v
    assert found.alternative_cycles == ()
    assert found.cycles_after_copies == 24  # all start before the tile
    assert found.bytes_out == (2 * 512 * 128, 4 * 512 * 128)  # output, and its logarithms of sums on 128 lanes
    assert found.total_bundles == 57
    slots = [list(map(int, line.split())) for line in excerpt[1].splitlines()[4:]][17:41]
    assert found.matrix_cycles == sum(row[0] for row in slots) / 4 > 10
    assert found.matrix_fill == pytest.approx(found.matrix_cycles / 24)
    assert found.spill_stores == sum(row[8] for row in slots) > 0
    assert found.spill_fills == sum(row[6] for row in slots) > 0
    assert found.slot_fill["VSTORE"] == pytest.approx(sum(row[7] for row in slots) / 24)


def test_listings_of_two_kernels_are_refused(excerpt):
    bundles, slots = excerpt
    with pytest.raises(ValueError, match="57 bundles but 56 rows"):
        listing.read(bundles, "\n".join(slots.splitlines()[:-1]), granule=32)


def _listings(*rows: tuple[str, int]) -> tuple[str, str]:
    """Listings of (what follows the address, matrix slots)."""
    bundles = "\n".join(f"{hex(at) if at else '0':>6} {text}" for at, (text, _) in enumerate(rows))
    return bundles, HEAD + "".join(f"{matrix} 0 0 0 0 0 0 0 0 0\n" for _, matrix in rows)


def test_an_empty_bundle_is_as_deep_as_the_one_before():
    bundles, slots = _listings(
        ("  :  { a }", 0), ("LB: > { b }", 1), ("  :  {}", 0), ("  :  {} /* End region 3 */", 0), ("  : > { c\nd }", 2),
        ("  :  { e }", 0),
    )  # fmt: skip
    assert listing.read(bundles, slots, granule=32).tile_cycles == 4


def test_the_innermost_loop_with_the_work_is_taken():
    outer = [("LB: > { a }", 1), ("  : > { b }", 0)]
    inner = [("LB: > > { c }", 4), ("  :  {}", 0), ("  : > > { d }", 4)]
    another = [("LB: > { e }", 1), ("  : > { f }", 0)]
    found = listing.read(*_listings(*outer, *inner, ("  : > { g }", 0), *another, ("  :  { h }", 9)), granule=32)
    assert (found.tile_cycles, found.matrix_cycles, found.total_bundles) == (3, 2.0, 9)


def _guarded(target, *body):
    """Rows that a branch jumps over, to the row of that number."""
    return [(f"  : > {{ sbr.rel (%p1) target bundleno = {target} ({hex(target)}), region = 2 }}", 0), *body]


def _copy(granules, way="hbm_to_vmem"):
    return f"  : > {{ %1 = dma.{way} [thread:$0] /*hbm=*/%s4, /*size_in_granules=*/{granules}, /*vmem=*/%s1 }}", 0


def test_of_alternatives_the_one_with_more_work_counts():
    rows = [
        ("LB: > { a }", 1),
        *_guarded(4, ("  : > { b }", 3), ("  : > { c }", 4)),
        *_guarded(10, ("  : > { d }", 4), *_guarded(9, ("  : > { e }", 0), ("  : > { f }", 0)), ("  : > { g }", 4)),
        ("  : > { h }", 0),
    ]
    found = listing.read(*_listings(*rows), granule=32)
    assert found.matrix_cycles == 2.0
    assert found.tile_cycles == 3  # d, the branch over e and f, g
    assert found.alternative_cycles == (2,)  # b and c, which do nearly as much
    assert found.conditional_cycles == (2,)  # e and f
    assert found.step_cycles == 11 - 4


def test_of_alternatives_that_do_the_same_the_longer_counts():
    rows = [
        ("LB: > { a }", 0),
        *_guarded(4, ("  : > { initialise }", 1), ("  : > { b }", 0)),
        *_guarded(7, ("  : > { whole }", 4), ("  : > { c }", 4)),
        *_guarded(11, ("  : > { masked }", 4), ("  : > { d }", 0), ("  : > { e }", 4)),
        ("  : > { f }", 0),
    ]
    found = listing.read(*_listings(*rows), granule=32)
    assert (found.tile_cycles, found.alternative_cycles, found.conditional_cycles) == (3, (2,), (2,))
    assert found.step_cycles == 12 - 2 - 2


def test_a_rare_loop_in_a_tile_does_not_count():
    rare = [("LB: > > { b }", 3), ("  : > > { c }", 3)]
    rows = [
        ("LB: > { a }", 0),
        *_guarded(8, ("  : > { d }", 4), ("  : > { e }", 4), *_guarded(8, ("  : > { f }", 0), *rare)),
        ("  : > { g }", 0),
    ]
    found = listing.read(*_listings(*rows), granule=32)
    assert found.tile_cycles == 3  # d, e, and the branch
    assert found.matrix_cycles == 2.0
    assert found.conditional_cycles == (1,)  # f, where the rare case begins
    assert found.step_cycles == 9 - 1 - 2


def test_starting_copies_is_part_of_every_step():
    rows = [
        ("LB: > { a }", 0),
        *_guarded(4, _copy(100), ("  : > { b }", 0)),
        *_guarded(6, ("  : > { initialise }", 0)),
        *_guarded(10, ("  : > { c }", 4), _copy(50), ("  : > { d }", 4)),
        *_guarded(12, _copy(25, "vmem_to_hbm")),
        ("  : > { e }", 0),
    ]
    found = listing.read(*_listings(*rows), granule=32)
    assert found.tile_cycles == 3
    assert found.conditional_cycles == (1, 1)  # initialisation; write-out, whose copy is not one from HBM
    assert found.step_cycles == 13 - 2
    assert found.cycles_after_copies == 2  # the copy in the tile, and d
    assert (found.bytes_in, found.bytes_out) == ((3200, 1600), (800,))


def test_a_kernel_without_matrix_work_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        listing.read(*_listings(("LB: > { a }", 0), ("  :  { b }", 4)), granule=32)


def test_a_kernel_is_found_by_its_name(tmp_path):
    for name in ("11-fwd.1", "12-bwd.1", "13-bwd.2"):
        for number, stage in ((64, f"schedule-analysis_{listing.BUNDLES}"), (65, listing.BUNDLES), (68, listing.SLOTS)):
            (tmp_path / f"{name}-{number}-{stage}.txt").touch()
    bundles, slots = listing.find(tmp_path, "fwd")
    assert (bundles.name, slots.name) == (f"11-fwd.1-65-{listing.BUNDLES}.txt", f"11-fwd.1-68-{listing.SLOTS}.txt")
    with pytest.raises(ValueError, match=r"2 kernels start with 'bwd'.*bwd\.1, bwd\.2, fwd\.1"):
        listing.find(tmp_path, "bwd")


def test_blocks():
    assert Blocks.parse("512x1024x256") == Blocks(512, 1024, 256)
    assert str(Blocks.parse("512x1024")) == "512x1024x1024"
    for text, words in (("512", "QUERIESxKEYS"), ("axb", "QUERIESxKEYS"), ("100x128", "128"), ("128x512x384", "384")):
        with pytest.raises(ValueError, match=words):
            Blocks.parse(text)


def test_unknown_chips_are_refused():
    with pytest.raises(ValueError, match=r"v9.*v5p"):
        tpu_schedule.Arguments(chips=("v9",))


def test_blocks_of_tilings():
    forward = flash.ForwardTiling(queries=1024, keys=512, compute_queries=256, compute_keys=128, ahead=2)
    assert Blocks.of(forward).forward == forward
    assert str(Blocks.of(forward)) == "1024x512x128, 256 rows, 2 ahead"
    backward = flash_backward.GradientTiling(block=1024, at_once=512, transposed=True)
    assert Blocks.of(backward, 2048).backward == backward
    assert str(Blocks.of(backward, 2048)) == "1024x2048x512, transposed"


def _schedule(**changed):
    sizes = dict(matrix_cycles=4096.0, matrix_fill=0.8, slot_fill={}, spill_stores=0, spill_fills=0, total_bundles=9000)
    cycles = dict(tile_cycles=5000, step_cycles=5400, conditional_cycles=(300, 100), alternative_cycles=())
    bytes_ = dict(cycles_after_copies=5000, bytes_in=(2**18, 2**18, 2**18), bytes_out=(2**18,))
    return listing.Schedule(**{**sizes, **cycles, **bytes_, **changed})


@pytest.mark.long
def test_cost():
    chip, blocks = compiler.CHIPS["v5p"], Blocks(1024, 1024, 512, 256, 1)
    found = cost("v5p", "anchors", "forward", blocks, _schedule(inner_cycles=(40, 2600)))
    assert chip.clock == pytest.approx(1.75e9, rel=0.01)
    assert compiler.CHIPS["v6e"].clock == pytest.approx(1.75e9, rel=0.01)
    assert found.step_per_pairs == 5400  # 2^20 pairs are one step
    assert found.tile_microseconds == pytest.approx(5000 / 1.75e3, rel=0.01)
    assert found.bytes_moved == 2**20
    assert found.transfer_microseconds == pytest.approx(2**20 / 1.23e6)
    assert found.hidden
    # 22 tiles of queries in each of 8 shots: a block of 504 rows of text, whose one part of 512 is computed, 21 whole
    # ones of video and 996 rows, two parts. The first block of every other shot isn't whole, since it begins 4 rows
    # after a multiple of 8.
    tiles = 8 * 22
    steps, partial, parts = tiles * 23, tiles * 2 + tiles // 2, tiles * 3 + tiles // 2 * 2
    cycles = steps * 400 + (steps - partial) * 5000 + partial * 4 * 40 + parts * 2600 + tiles * 400
    idle = found.scene_per_pairs * 8 * 22_500 * 23_004 / 2**20 - cycles
    assert 0 <= idle <= 400 * 23 * 30  # steps of tiles that no shot needs, and of rows beyond them
    schedule = _schedule(inner_cycles=(40, 2600))
    assert cost("v5p", "picks", "forward", blocks, schedule).step_per_pairs == 5800  # initialised in every step


@pytest.mark.long
def test_transfers_that_take_longer_than_the_tile_are_not_hidden():
    blocks, loops = Blocks(1024, 1024, 512), (40, 2600)
    assert not cost("v5p", "anchors", "forward", blocks, _schedule(bytes_in=(2**22,), inner_cycles=loops)).hidden
    late = _schedule(cycles_after_copies=100, bytes_in=(2**17,), inner_cycles=loops)  # 107 ns, behind 57 ns of the tile
    assert not cost("v5p", "anchors", "forward", blocks, late).hidden


def _files():
    """Entries as stored: splash at two sizes, anchors at one of them and at their best."""
    entries = {}
    for kernel, q, cycles in (("splash", 1024, 5000), ("splash", 512, 2700), ("anchors", 1024, 4500)):
        blocks = Blocks(q, 1024, 512)
        schedule = _schedule(tile_cycles=cycles, step_cycles=cycles + 400, inner_cycles=(40, 2600))
        costs = as_json(cost("v5p", kernel, "forward", blocks, schedule))
        what = {"kernel": kernel, "pass": "forward", "blocks": dataclasses.asdict(blocks), "head_dim": 128}
        entries[f"{kernel} {q}"] = {**what, **dataclasses.asdict(schedule), **costs}
    entries["none"] = {**what, "kernel": "picks", "error": "too large"}
    return [{"chip": "TPU v5p", "entries": entries}]


@pytest.mark.long
def test_tables():
    (_, _, *rows) = schedule_table(_files())
    cycles = "| v5p | anchors forward | 1024 x 1024 | 4,500 | 5,000 | 0.90 | 4,900 | 5,400 | 0.91 |"
    assert rows[0].startswith(f"{cycles} 80% | 0 / 0 | 0 / 0 | 1.05 |")
    assert "not hidden" not in rows[0]
    assert rows[1].startswith("| v5p | picks forward | 1024 x 1024 | does not compile |")
    assert len({row.count("|") for row in rows}) == 1
    assert schedule_table(_files(), [("anchors", 512, 512)]) == []
    (head, _, forward, _) = schedule_best_table(_files())
    assert forward == "| v5p | forward | 1024 x 1024 | 5,400 | 1024 x 1024 | 4,900 | 0.91 |  |  |  |  |  |"
    assert head.count("|") == forward.count("|")


@pytest.mark.long
def test_both_kernels_count_by_their_pairs():
    (file,) = _files()
    picks = file["entries"]["anchors 1024"] | {"kernel": "picks", "step_per_pairs": 6000.0}
    (_, _, forward, _) = schedule_best_table([{**file, "entries": file["entries"] | {"picks": picks}}])
    anchors, picks = 180_000 * 23_004, 157_500 * 5 * 1250
    both = (4900 * anchors + 6000 * picks) / (anchors + picks)
    assert forward.endswith(f"| 1024 x 1024 | 6,000 | 1.11 | {both:,.0f} | {both / 5400:.2f} |")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("chip", "cycles", "matrix_slots"), [("v5p", 548, 4), ("v5e", 548, 4)])
def test_splash(chip, cycles, matrix_slots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    chosen = ["--chips", chip, "--kernels", "splash", "--blocks", "128x128", "--no-best"]
    tpu_schedule.run([*chosen, "--out", str(tmp_path)])
    (stored,) = results.load(tmp_path, "tpu_schedule")
    assert stored["chip"] == f"TPU {chip}"
    forward, backward = sorted(stored["entries"].values(), key=lambda e: e["pass"] == "backward")
    assert "libtpu" in forward["versions"]
    # A slot multiplies a row of 128 by 128 x 128 in a cycle: 2 products forward, 5 backward, none lost, none twice.
    assert forward["matrix_cycles"] == 2 * 128 / matrix_slots
    assert backward["matrix_cycles"] == 5 * 128 / matrix_slots
    assert forward["tile_cycles"] == pytest.approx(cycles, rel=0.05)
    assert forward["tile_cycles"] < forward["step_cycles"] < forward["total_bundles"]
    assert forward["bytes_in"] == [2 * 128 * 128] * 3
    assert (forward["spill_stores"], forward["spill_fills"]) == (0, 0)
    assert not list(tmp_path.glob("tpu_schedule_*"))  # gigabytes of listings, if they stayed


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("kernel", "way"), [("anchors", "forward"), ("picks", "backward")])
def test_our_kernels_are_read(kernel, way):
    """At sizes whose matrix work is known: no product is lost, none of another body or of a rare case counts."""
    blocks = Blocks(512, 256, 256, 256, 1) if way == "forward" else Blocks(512, 256, 128, transposed=False)
    found = compiler.compile_for("v5p", kernel, way, blocks).schedule
    assert found.matrix_cycles == (2 if way == "forward" else 5) * 512 * 256 / 128 / 4
    assert found.tile_cycles < found.step_cycles < found.tile_cycles + 800
    assert found.alternative_cycles == ()
    assert len(found.inner_cycles) == (3 if way == "forward" else 0)  # blocks that are not whole, and rare ones
    queries, keys = 2 * 512 * 128, 2 * 256 * 128
    assert [found.bytes_in.count(size) for size in (queries, keys)] == [1 if way == "forward" else 2, 2]


@pytest.mark.tpu_compiler
def test_why_something_is_not_compiled_is_stored(tmp_path, capsys):
    chosen = ["--chips", "v5e", "--kernels", "picks", "--passes", "forward", "--blocks", "128x128", "--no-best"]
    tpu_schedule.run([*chosen, "--timeout", "0.01", "--out", str(tmp_path)])
    (stored,) = results.load(tmp_path, "tpu_schedule")
    (entry,) = stored["entries"].values()
    assert entry["error"].startswith("picks forward 128x128x128, 128 rows")
    assert entry["error"].endswith("for v5e: not compiled in 0.01 s")
    assert "does not compile" in capsys.readouterr().out


@pytest.mark.slow  # the compiler finds out at the very end
@pytest.mark.tpu_compiler
def test_the_compiler_says_what_is_wrong():
    with pytest.raises(compiler.CompilationError, match=r"splash forward 1024x8192x1024 for v4: .*VmemOom"):
        compiler.compile_for("v4", "splash", "forward", Blocks(1024, 8192, 1024))
