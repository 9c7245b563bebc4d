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
of it do. A *step* is one turn of the loop: the tile, and whatever is beside it in no region or in one that starts
copies from HBM, which every step but the last does. Other regions run in some steps only: initialisation and write-out,
or in place of the tile, if they do as much (a block with masks, and one without: the longer is the tile). Where loops
are nested, the one with most of the matrix work is taken, and loops inside of it, which are for rare cases, are left
out.

Nothing here knows of waits for memory: cycles are a lower bound, and bytes are there to be held against them.
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
    """Of each region that only some steps run: initialisation, write-out."""
    alternative_cycles: tuple[int, ...]
    """Of each region that does a tile of another kind, in place of the tile."""
    cycles_after_copies: int
    """Of the tile, from the start of the last copy from HBM on: what hides that copy."""
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
    inner_cycles: tuple[int, ...] = ()
    """Of one turn of each loop but the first, the grid, in the order in which they begin."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The instructions of one cycle."""

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


def kernels(folder: pathlib.Path, start: str) -> list[str]:
    """Names of the kernels in a folder of listings, as far as they start so."""
    return sorted(name for name in _files(folder, SLOTS) if name.startswith(start))


def find(folder: pathlib.Path, kernel: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The listings of bundles and of slots of the one kernel in a folder whose name starts so.

    Raises:
        ValueError: no kernel or several are called so.
    """
    names = kernels(folder, kernel)
    if len(names) != 1:
        known = ", ".join(kernels(folder, ""))
        raise ValueError(f"{len(names)} kernels start with {kernel!r}, it must be one; compiled were {known}")
    return _files(folder, BUNDLES)[names[0]], _files(folder, SLOTS)[names[0]]


def _files(folder: pathlib.Path, stage: str) -> dict[str, pathlib.Path]:
    """The listings of a stage, by kernel."""
    pattern = re.compile(rf"\d+-(.*)-\d+-{re.escape(stage)}\.txt")
    return {found[1]: path for path in folder.iterdir() if (found := pattern.fullmatch(path.name))}


def read(bundles: str, slots: str, granule: int) -> Schedule:
    """The schedule of a kernel from the text of its two listings; copies are counted in granules of so many bytes.

    Raises:
        ValueError: the listings differ in length, or no loop does matrix work.
    """
    capacity, filled = parse_slots(slots)
    rows = parse_bundles(bundles, filled)
    loop = matrix_loop(rows)
    region, beside = _tile(loop)
    turn = [index for index in range(len(loop)) if loop[index].depth == loop[0].depth]
    turn = [index for index in turn if not any(index in range(*other) for other in beside)]
    tile = [loop[index] for index in turn if index in range(*region)]
    cycles, work = len(tile), matrix_work(tile)
    starts = [index for index, row in enumerate(loop) if _starts_copies_in(row)]
    alternative, conditional = [], []
    for begin, end in beside:
        own = [row for row in loop[begin:end] if row.depth == loop[0].depth]
        (alternative if 2 * matrix_work(own) > work else conditional).append(len(own))
    fill = {kind: sum(row.slots[kind] for row in tile) / (capacity[kind] * cycles) for kind in capacity}
    copies = [found for row in loop for found in _COPY.finditer(row.text)]
    sizes = {
        way: tuple(granule * int(c["granules"]) for c in copies if c["way"] == way)
        for way in ("hbm_to_vmem", "vmem_to_hbm")
    }
    return Schedule(
        tile_cycles=cycles,
        step_cycles=len(turn),
        conditional_cycles=tuple(conditional),
        alternative_cycles=tuple(alternative),
        cycles_after_copies=sum(index in range(max(region[0], *starts, 0), region[1]) for index in turn),
        matrix_cycles=work / capacity["MXU"],
        matrix_fill=fill["MXU"],
        slot_fill=fill,
        spill_stores=sum(row.slots["VSTORE:SPILL"] for row in tile),
        spill_fills=sum(row.slots["VLOAD:FILL"] for row in tile),
        bytes_in=sizes["hbm_to_vmem"],
        bytes_out=sizes["vmem_to_hbm"],
        total_bundles=len(rows),
        inner_cycles=tuple(loop.cycles for loop in _loops(rows)[1:]),
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

    A bundle's text may continue over lines that don't start with an address: those belong to it.
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


@dataclasses.dataclass
class Loop:
    """A loop of a kernel; the grid is the first."""

    depth: int
    cycles: int = 0
    """Of one turn, all regions counted as if every turn ran them; not those of loops inside of it."""


def loops(bundles: str, slots: str) -> list[Loop]:
    """All loops of a kernel, in the order in which they begin."""
    return _loops(parse_bundles(bundles, parse_slots(slots)[1]))


def _loops(rows: list["Bundle"]) -> list[Loop]:
    found: list[Loop] = []
    around: list[Loop] = []
    for row in rows:
        while around and (row.depth < around[-1].depth or (row.mark == "LB" and row.depth == around[-1].depth)):
            around.pop()
        if row.mark == "LB":
            around.append(Loop(row.depth))
            found.append(around[-1])
        if around:
            around[-1].cycles += 1
    return found


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
    """The region that does most of the matrix work by itself, and those that not every step runs."""
    regions = {(0, len(loop)), *_regions(loop)}
    work = dict.fromkeys(regions, 0)
    for index, row in enumerate(loop):
        if row.slots["MXU"] and row.depth == loop[0].depth:
            innermost = min((r for r in regions if index in range(*r)), key=lambda r: r[1] - r[0])
            work[innermost] += row.slots["MXU"]
    tile = max(regions, key=lambda r: (work[r], _rows(loop, r), -r[0]))
    left_out = [r for r in regions if r != tile and not _inside(tile, r) and not _in_every_step(loop, r, tile)]
    return tile, sorted(r for r in left_out if not any(_inside(r, other) for other in left_out))


def _in_every_step(loop: list[Bundle], region: Region, tile: Region) -> bool:
    """Whether the region is part of the tile, with matrix work of its own, or starts copies from HBM."""
    rows = loop[slice(*region)]
    if _inside(region, tile):
        return matrix_work([row for row in rows if row.depth == loop[0].depth]) > 0
    return matrix_work(rows) == 0 and any(map(_starts_copies_in, rows))


def _starts_copies_in(row: Bundle) -> bool:
    return any(found["way"] == "hbm_to_vmem" for found in _COPY.finditer(row.text))


def _rows(loop: list[Bundle], region: Region) -> int:
    return sum(row.depth == loop[0].depth for row in loop[slice(*region)])


def _inside(inner: Region, outer: Region) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
