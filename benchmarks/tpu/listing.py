"""Reads the TPU compiler's listings of one kernel: cycles, matrix-unit slots, spills and transfers per tile.

A TPU core issues one bundle of instructions per cycle. Of the many listings that the compiler writes of a kernel, two
describe the program after registers are allocated, when spills are in it, and before idle cycles are folded into
delays, when every cycle still is a line:

- `*-packed-bundles-post-ra.txt`: the bundles. `0x7f LB: > { ... }` is address, mark (LB: a loop begins), depth of loops
  and instructions. Empty bundles `{}` carry no depth; they have that of the bundle before them.
- `*-pre-delay_hlo-static-per-bundle-utilization.txt`: how many slots of each kind are filled, in the same order.

(The final bundles have lost the idle cycles: a tile of 128 x 128 would look twice as fast as it is.)

The grid of a Pallas kernel is a loop. What `pl.when` guards is a region that a branch jumps over: `sbr.rel (%p) target
bundleno = 536 (0x218)`. The *tile* is the region with most of the loop's matrix work, not counting what regions inside
of it do; a *step* is one turn of the loop without the regions beside the tile, since those (initialisation, write-out)
run in some steps only. Where loops are nested, the one with most of the matrix work is taken and the others left out.

Nothing here knows of waits for memory: cycles are a lower bound.
"""

import dataclasses
import functools
import pathlib
import re

BUNDLES, SLOTS = "packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"
_BUNDLE = re.compile(r"\s*(?P<address>0x[0-9a-f]+|0)\s+(?:(?P<mark>[A-Z]{2})|)\s*:(?P<depth>[ >]*)\{(?P<text>.*)")
_BRANCH = re.compile(r"sbr\.rel .*?target bundleno = (\d+)")
_COPY = re.compile(r"dma\.(?P<way>hbm_to_vmem|vmem_to_hbm) .*?/\*size_in_granules=\*/(?P<granules>\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """One kernel as it is scheduled. Everything but the last field is about the loop with most of the matrix work."""

    tile_cycles: int
    """Of the region that does a tile."""
    step_cycles: int
    """Of one turn of the loop: the tile, addresses, starting copies, waiting for them."""
    conditional_cycles: tuple[int, ...]
    """Of each region that is in neither: initialisation, write-out, another kind of tile."""
    matrix_cycles: float
    """That the tile would take if its matrix units were always busy."""
    matrix_fill: float
    """Share of the matrix-unit slots that are filled in the tile."""
    slot_fill: dict[str, float]
    """The same for each kind of slot, by the compiler's names."""
    spill_stores: int
    """Vector registers stored in the tile because there are too few."""
    spill_fills: int
    """Loads of those."""
    bytes_in: tuple[int, ...]
    """Of each copy that the loop starts from HBM; a block that stays is not copied again."""
    bytes_out: tuple[int, ...]
    """Of each copy to HBM."""
    total_bundles: int
    """Of the whole kernel."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    address: int
    mark: str
    depth: int
    text: str
    slots: dict[str, int]
    """Filled ones, by kind."""

    @functools.cached_property
    def branch(self) -> int | None:
        """The address that the bundle may jump to."""
        found = _BRANCH.search(self.text)
        return int(found[1]) if found else None


def find(folder: pathlib.Path, kernel: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The listings of bundles and of slots of the one kernel in a folder whose name starts so.

    Raises:
        ValueError: no kernel or several are called so.
    """
    found = []
    for stage in (BUNDLES, SLOTS):
        pattern = re.compile(rf"\d+-(?P<kernel>{re.escape(kernel)}.*)-\d+-{re.escape(stage)}\.txt")
        paths = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
        if len(paths) != 1:
            known = sorted(
                {m[1] for p in folder.iterdir() if (m := re.fullmatch(rf"\d+-(.*)-\d+-{stage}\.txt", p.name))}
            )
            raise ValueError(
                f"{len(paths)} kernels start with {kernel!r}, it must be one; compiled were {', '.join(known)}"
            )
        found.append(paths[0])
    return found[0], found[1]


def read(bundles: str, slots: str, granule: int) -> Schedule:
    """The schedule of a kernel from the text of its two listings; copies are counted in granules of so many bytes.

    Raises:
        ValueError: the listings differ in length, or no loop does matrix work.
    """
    capacity, filled = parse_slots(slots)
    rows = parse_bundles(bundles, filled)
    loop = matrix_loop(rows)
    region, beside = _tile(loop)
    inside = [loop[index] for index in range(*region) if not any(index in range(*other) for other in beside)]
    tile = [row for row in inside if row.depth <= loop[0].depth]  # a loop in the tile is for rare cases
    cycles = len(tile)
    fill = {kind: sum(row.slots[kind] for row in tile) / (capacity[kind] * cycles) for kind in capacity}
    copies = [found for row in loop for found in _COPY.finditer(row.text)]
    sizes = {
        way: tuple(granule * int(c["granules"]) for c in copies if c["way"] == way)
        for way in ("hbm_to_vmem", "vmem_to_hbm")
    }
    conditional = tuple(end - begin for begin, end in beside)
    return Schedule(
        tile_cycles=cycles,
        step_cycles=len(loop) - sum(conditional),
        conditional_cycles=conditional,
        matrix_cycles=matrix_work(tile) / capacity["MXU"],
        matrix_fill=fill["MXU"],
        slot_fill=fill,
        spill_stores=sum(row.slots["VSTORE:SPILL"] for row in tile),
        spill_fills=sum(row.slots["VLOAD:FILL"] for row in tile),
        bytes_in=sizes["hbm_to_vmem"],
        bytes_out=sizes["vmem_to_hbm"],
        total_bundles=len(rows),
    )


def parse_slots(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """How many slots a bundle has, and how many of them each bundle fills, by kind."""
    _, _, rest = text.partition("\n")  # a title
    head, _, table = rest.partition("== UTILIZATION:")
    names, counts = head.strip().splitlines()
    kinds = [name.strip() for name in names.split(",")]
    filled = [dict(zip(kinds, map(int, line.split()), strict=True)) for line in table.strip().splitlines()]
    return dict(zip(kinds, map(int, counts.split()), strict=True)), filled


def parse_bundles(text: str, filled: list[dict[str, int]]) -> list[Bundle]:
    """The bundles with the slots that they fill.

    A bundle's text may go on over lines that don't start with an address: those belong to it.
    """
    found: list[tuple[re.Match[str], list[str]]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            found.append((match, [match["text"]]))
        elif found:
            found[-1][1].append(line)
    if len(found) != len(filled):
        raise ValueError(f"{len(found)} bundles but {len(filled)} rows of slots: not two listings of one kernel")
    rows, depth = [], 0
    for (match, lines), slots in zip(found, filled):
        content = " ".join(lines)
        if not content.startswith("}"):
            depth = match["depth"].count(">")
        rows.append(Bundle(int(match["address"], 16), match["mark"] or "", depth, content, slots))
    return rows


def matrix_work(rows: list[Bundle]) -> int:
    """Matrix-unit slots filled."""
    return sum(row.slots["MXU"] for row in rows)


def matrix_loop(rows: list[Bundle]) -> list[Bundle]:
    """The loop that does most of the matrix work, not counting what loops inside of it do.

    Raises:
        ValueError: there is none.
    """
    loops: list[tuple[int, list[Bundle]]] = []
    for begin, row in enumerate(rows):
        if row.mark != "LB":
            continue
        end = begin + 1
        while end < len(rows) and rows[end].depth >= row.depth:
            if rows[end].mark == "LB" and rows[end].depth == row.depth:
                break  # the next loop
            end += 1
        loop = rows[begin:end]
        loops.append((matrix_work([r for r in loop if r.depth == row.depth]), loop))
    work, loop = max(loops, key=lambda found: found[0], default=(0, []))
    if work == 0:
        raise ValueError("no loop of this kernel uses the matrix units")
    return loop


Region = tuple[int, int]
"""Rows of a loop: first, and one after the last."""


def _regions(loop: list[Bundle]) -> list[Region]:
    """What branches of the loop jump over."""
    at = {row.address: index for index, row in enumerate(loop)}
    targets = ((index, at.get(row.branch)) for index, row in enumerate(loop) if row.branch is not None)
    return [(index + 1, target) for index, target in targets if target is not None and target > index]


def _tile(loop: list[Bundle]) -> tuple[Region, list[Region]]:
    """The region that does most of the matrix work by itself, and those beside it or idle inside of it."""
    regions = {(0, len(loop)), *_regions(loop)}
    work = dict.fromkeys(regions, 0)
    for index, row in enumerate(loop):
        if row.slots["MXU"]:
            innermost = min((r for r in regions if index in range(*r)), key=lambda r: r[1] - r[0])
            work[innermost] += row.slots["MXU"]
    tile = max(regions, key=lambda r: (work[r], r[1] - r[0], -r[0]))
    others = [r for r in regions if r != tile and not _inside(tile, r)]
    left_out = [r for r in others if not (_inside(r, tile) and matrix_work(loop[slice(*r)]))]
    return tile, sorted(r for r in left_out if not any(_inside(r, other) for other in left_out))


def _inside(inner: Region, outer: Region) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
