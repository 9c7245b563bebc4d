"""benchmarks/tpu: the parser on listings, and, where libtpu is installed, a kernel that is really compiled."""

import pathlib
import tempfile

import pytest

from benchmarks import results, tpu_schedule
from benchmarks.tpu import compiler, listing
from benchmarks.tpu.kernels import Blocks

FOLDER = pathlib.Path(__file__).parent / "listings"
HEAD = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
needs_libtpu = pytest.mark.skipif(not compiler.installed(), reason="needs libtpu: pip install -e '.[tpu]'")


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


def test_of_alternatives_the_one_with_more_work_counts():
    def guarded(target, *body):
        return [(f"  : > {{ sbr.rel (%p1) target bundleno = {target} ({hex(target)}), region = 2 }}", 0), *body]

    rows = [
        ("LB: > { a }", 1),
        *guarded(4, ("  : > { b }", 3), ("  : > { c }", 4)),
        *guarded(10, ("  : > { d }", 4), *guarded(9, ("  : > { e }", 0), ("  : > { f }", 0)), ("  : > { g }", 4)),
        ("  : > { h }", 0),
    ]
    found = listing.read(*_listings(*rows), granule=32)
    assert found.matrix_cycles == 2.0
    assert found.tile_cycles == 3  # d, the branch over e and f, g
    assert found.conditional_cycles == (2, 2)  # b and c; e and f
    assert found.step_cycles == 11 - 4


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


@needs_libtpu
@pytest.mark.parametrize(("chip", "cycles", "matrix_slots"), [("v5p", 548, 4), ("v5e", 548, 4)])
def test_splash(chip, cycles, matrix_slots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tpu_schedule.run(["--chips", chip, "--kernels", "splash", "--blocks", "128x128", "--out", str(tmp_path)])
    (stored,) = results.load(tmp_path, "tpu_schedule")
    assert stored["chip"] == f"TPU {chip}"
    (entry,) = stored["entries"].values()
    assert "libtpu" in entry["versions"]
    forward, backward = entry["passes"]["forward"], entry["passes"]["backward"]
    # A slot multiplies a row of 128 by 128 x 128 in a cycle: 2 products forward, 5 backward, none lost, none twice.
    assert forward["matrix_cycles"] == 2 * 128 / matrix_slots
    assert backward["matrix_cycles"] == 5 * 128 / matrix_slots
    assert forward["tile_cycles"] == pytest.approx(cycles, rel=0.05)
    assert forward["tile_cycles"] < forward["step_cycles"] < forward["total_bundles"]
    assert forward["bytes_in"] == [2 * 128 * 128] * 3
    assert (forward["spill_stores"], forward["spill_fills"]) == (0, 0)
    assert "128 / 128 / 128" in capsys.readouterr().out
    assert not list(tmp_path.glob("tpu_schedule_*"))  # gigabytes of listings, if they stayed


@needs_libtpu
def test_why_something_is_not_compiled_is_stored(tmp_path, capsys):
    chosen = ["--chips", "v5e", "--blocks", "128x128", "--timeout", "0.01"]
    tpu_schedule.run([*chosen, "--out", str(tmp_path)])
    (stored,) = results.load(tmp_path, "tpu_schedule")
    (entry,) = stored["entries"].values()
    assert entry["error"] == "splash 128x128x128 for v5e: not compiled in 0.01 s"
    assert "does not compile" in capsys.readouterr().out


@pytest.mark.slow  # the compiler finds out at the very end
@needs_libtpu
def test_the_compiler_says_what_is_wrong():
    with pytest.raises(compiler.CompilationError, match=r"splash 1024x8192x1024 for v4: .*out of memory.* vmem"):
        compiler.compile_for("v4", "splash", "1024x8192x1024")
