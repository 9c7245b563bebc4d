"""Results -> markdown. Only figures of the given entries; what was not measured is left empty."""

from collections.abc import Container, Iterable, Sequence
from typing import Any

from benchmarks.tpu.cost import scene_pairs

Entry = dict[str, Any]
_EMPTY = ""


def attention_tables(entries: Sequence[Entry]) -> list[str]:
    """Lines of markdown: the settings, those with quoted figures again beside them, scaling, and each part's table."""
    settings = [e for e in entries if "points" not in e]
    tables = [_settings_table(settings), quoted_table(settings)]
    tables += [_scaling_table(e) for e in entries if "points" in e]
    tables += [parts_table(e) for e in settings if "parts" in e]
    return separated(tables)


def short_table(entries: Sequence[Entry]) -> list[str]:
    """The settings' times and ratios alone."""
    head = ["setting", "routes", "tokens", "MoC forward", "dense", "ratio", "MoC forward + backward", "dense", "ratio"]
    rows = [
        [
            setting_name(e),
            e["inputs"],
            f"{e['tokens']:,}",
            *_versus(e["forward"]),
            *_versus(e["forward_backward"]),
            f"{e['pairs']['bound']:.2f}x",
        ]
        for e in entries
    ]
    return markdown([*head, "bound"], rows)


def summary_table(attention: Iterable[Entry], model: Iterable[Entry]) -> list[str]:
    """Lines of markdown: what the multi-shot scene takes, its picks random, by files of attention and of the model."""
    rows, tokens = [], 0
    for file in attention:
        for e in file["entries"].values():
            if "points" in e or (e["setting"], e["inputs"]) != ("multi_shot", "random"):
                continue
            tokens = e["tokens"]
            for way, name in (("forward", "forward"), ("forward_backward", "forward and backward")):
                rows.append([f"one layer's attention, {name}", file["card"], *_versus(e[way])])
    for file in model:
        for e in file["entries"].values():
            if e["tokens"] != tokens:
                continue
            size = f"model of {e['parameters'] / 1e9:.1f} B parameters{e.get('variant', '')}"
            for step, found in e["steps"].items():
                if "ratio" not in found:  # measured with one of them alone
                    continue
                times = (_seconds(found.get(name)) for name in ("moc", "dense"))
                ratio = number(found.get("ratio"), ".2f", "x")
                rows.append([f"{size}, a {step} step", file["card"], *times, ratio])
    return markdown([f"{tokens:,} tokens", "on one", "MoC", "dense", "times as fast"], rows)


def _settings_table(entries: Sequence[Entry]) -> list[str]:
    head = [
        "setting", "inputs", "backend", "tokens", "bound", "U/k",
        "forward: MoC", "dense", "ratio",
        "forward + backward: MoC", "dense", "ratio",
        "routing", "sorting", "share", "peak / tensors",
    ]  # fmt: skip
    rows = [
        [
            setting_name(e),
            e["inputs"],
            e["backend"],
            f"{e['tokens']:,}",
            f"{e['pairs']['bound']:.2f}x",
            number(e["union_ratio"], ".1f"),
            *_versus(e["forward"]),
            *_versus(e["forward_backward"]),
            milliseconds(e["routing"]),
            milliseconds(e["sorting"]),
            f"{e['routing_share']:.0%}",
            f"{e['memory']['peak_over_tensors']:.2f}x",
        ]
        for e in entries
    ]
    return markdown(head, rows)


def quoted_table(entries: Sequence[Entry]) -> list[str]:
    """The entries that have figures of others, beside these."""
    head = [
        "routed part alone", "inputs",
        "forward: MoC", "quoted, not measured in this run", "ratio",
        "forward + backward: MoC", "quoted, not measured in this run", "ratio",
    ]  # fmt: skip
    rows = []
    for e in entries:
        if "quoted" not in e:
            continue
        cells = [setting_name(e), e["inputs"]]
        for way in ("forward", "forward_backward"):
            theirs = f"{e['quoted'][f'{way}_ms']:g} ms ({e['quoted']['what']})"
            cells += [milliseconds(e[way]["moc"]), theirs, f"{e[way]['quoted_ratio']:.2f}x"]
        rows.append(cells)
    return markdown(head, rows)


def _scaling_table(entry: Entry) -> list[str]:
    head = [
        "shots",
        "tokens",
        "forward: MoC",
        "dense",
        "ratio",
        "bound",
        f"time per token / {entry['base_shots']} shots",
    ]
    rows = []
    for p in entry["points"]:
        both = "moc" in p and "dense" in p
        rows.append(
            [
                str(p["shots"]),
                f"{p['tokens']:,}",
                milliseconds(p.get("moc")),
                milliseconds(p.get("dense")),
                f"{p['dense']['median_ms'] / p['moc']['median_ms']:.2f}x" if both else _EMPTY,
                f"{p['pairs']['bound']:.2f}x",
                number(p.get("per_token_over_base"), ".2f"),
            ]
        )
    return markdown(head, rows)


def parts_table(entry: Entry) -> list[str]:
    """Each part of one entry: FLOPs, bytes, floors and time."""
    head = [
        f"part of {setting_name(entry)}, {entry['inputs']}", "GFLOP", "GB",
        "floor (data sheet)", "floor (measured rates)", "time", "TFLOP/s", "GB/s",
    ]  # fmt: skip
    rows = []
    for part in entry["parts"]:
        ms = part["time"]["median_ms"]
        floors = (number(part[name], ".3g", " ms") for name in ("floor_ms", "measured_floor_ms"))
        rates = f"{part['gflop'] / ms:.0f}", f"{1e3 * part['gigabytes'] / ms:.0f}"
        work = f"{part['gflop']:,.1f}", f"{part['gigabytes']:.3g}"
        rows.append([part["part"], *work, *floors, milliseconds(part["time"]), *rates])
    return markdown(head, rows)


def model_tables(entries: Iterable[Entry]) -> list[str]:
    """Lines of markdown: each step of each model."""
    head = ["step", "model", "layers", "width", "parameters", "tokens", "MoC", "of peak", "dense", "ratio", "bound"]
    head += ["peak: MoC", "dense"]
    rows = []
    for e in entries:
        for step, found in e["steps"].items():
            both = [found.get(name) for name in ("moc", "dense")]
            peaks = (f"{x['memory']['peak'] / 2**30:.1f} GiB" if x else _EMPTY for x in both)
            ours, theirs = map(_seconds, both)
            name = ("Wan" if e["model"]["name"] == "wan" else "MMDiT") + e.get("variant", "")
            model = name, str(e["model"]["depth"]), str(e["model"]["dim"]), f"{e['parameters'] / 1e6:,.0f} M"
            share = number((both[0] or {}).get("share_of_peak"), ".1%")
            ratios = number(found.get("ratio"), ".2f", "x"), f"{found.get('bound') or e['bound']:.2f}x"
            rows.append([step, *model, f"{e['tokens']:,}", ours, share, theirs, *ratios, *peaks])
    return markdown(head, rows)


def split_table(entries: Iterable[Entry]) -> list[str]:
    """Lines of markdown: where the device's time of a step goes, for steps that were traced."""
    head = ["step", "layers", "width", "tokens", "with", "attention", "matrix products", "the rest", "share", "kernels"]
    rows = []
    for e in entries:
        for step, found in e["steps"].items():
            for name in ("moc", "dense"):
                split = found.get(name, {}).get("split")
                if split is None:
                    continue
                parts = [split[kind] for kind in ("attention", "products", "other")]
                cells = [step, str(e["model"]["depth"]), str(e["model"]["dim"]), f"{e['tokens']:,}", name]
                share = f"{parts[2] / sum(parts):.0%}"
                rows.append([*cells, *(f"{ms:.1f} ms" for ms in parts), share, f"{split['kernels']:,}"])
    return markdown(head, rows)


def schedule_table(files: Iterable[Entry], sizes: Iterable[tuple[str, int, int]] | None = None) -> list[str]:
    """Lines of markdown: the TPU compiler's schedule of each kernel beside splash in blocks of the same rows.

    Args:
        files: By chip, what benchmarks.tpu_schedule stored.
        sizes: Kernel, queries and keys of those to show; None: all.
    """
    head = [
        "chip", "kernel", "queries x keys", "cycles per tile", "splash", "ratio", "cycles per step", "splash", "ratio",
        "matrix slots filled", "spills: stores / loads", "splash", "MB moved", "time of that", "of the tile",
    ]  # fmt: skip
    rows = []
    for file in files:
        entries = list(file["entries"].values())
        for e in sorted(entries, key=lambda e: (e["pass"] == "backward", e["kernel"], e["blocks"]["q"])):
            size = e["blocks"]["q"], e["blocks"]["kv"]
            if e["kernel"] == "splash" or (sizes is not None and (e["kernel"], *size) not in sizes):
                continue
            row = [file["chip"].removeprefix("TPU "), f"{e['kernel']} {e['pass']}", f"{size[0]} x {size[1]}"]
            if "error" in e:
                rows.append([*row, "does not compile", *[_EMPTY] * (len(head) - len(row) - 1)])
                continue
            alike = [
                s for s in _compiled(entries, "splash", e["pass"]) if (s["blocks"]["q"], s["blocks"]["kv"]) == size
            ]
            theirs = min(alike, key=lambda s: s["tile_cycles"], default=None)
            for name in ("tile_cycles", "step_cycles"):
                other, ratio = (None, None) if theirs is None else (theirs[name], e[name] / theirs[name])
                row += [f"{e[name]:,}", number(other, ","), number(ratio, ".2f")]
            row += [f"{e['matrix_fill']:.0%}", _spills(e), _EMPTY if theirs is None else _spills(theirs)]
            transfer = f"{e['transfer_microseconds']:.2f} us" + ("" if e["hidden"] else ", not hidden")
            rows.append([*row, f"{e['bytes_moved'] / 1e6:.2f}", transfer, f"{e['tile_microseconds']:.2f} us"])
    return markdown(head, rows)


def schedule_best_table(files: Iterable[Entry]) -> list[str]:
    """Lines of markdown: each kernel where a whole step takes the fewest cycles per pair, beside splash at its best.

    The two kernels share the work of one attention: "both" weighs them by the pairs that each has in the reference
    scene.
    """
    kernels = ["anchors", "cycles", "ratio", "picks", "cycles", "ratio", "both, by pairs", "ratio"]
    rows = []
    for file in files:
        entries = list(file["entries"].values())
        for way in ("forward", "backward"):
            row, best = [file["chip"].removeprefix("TPU "), way], {}
            for kernel in ("splash", "anchors", "picks"):
                found = min(_compiled(entries, kernel, way), key=lambda e: e["step_per_pairs"], default=None)
                if found is None:
                    row += [_EMPTY] * (2 if kernel == "splash" else 3)
                    continue
                best[kernel] = found["step_per_pairs"]
                row += [f"{found['blocks']['q']} x {found['blocks']['kv']}", f"{best[kernel]:,.0f}"]
                if kernel != "splash":
                    row.append(_times_splash(best, best[kernel]))
            if "anchors" in best and "picks" in best:
                pairs = {kernel: scene_pairs(kernel, way) for kernel in ("anchors", "picks")}
                both = sum(best[kernel] * n for kernel, n in pairs.items()) / sum(pairs.values())
                row += [f"{both:,.0f}", _times_splash(best, both)]
            else:
                row += [_EMPTY] * 2
            rows.append(row)
    return markdown(["chip", "pass", "splash at its best", "cycles", *kernels], rows)


def _times_splash(best: dict[str, float], cycles: float) -> str:
    return number(cycles / best["splash"] if "splash" in best else None, ".2f")


def estimate_table(files: Iterable[Entry]) -> list[str]:
    """Lines of markdown: the whole operation beside splash attention, by chip; files of benchmarks.tpu_estimate."""
    head = ["chip", "cores", "pass", "MoC", "splash, dense", "ratio", "anchors", "picks", "routing and pairs", "XLA"]
    rows = []
    for file in files:
        for way in ("forward", "backward"):
            if way not in file["entries"]:
                continue
            e = file["entries"][way]
            parts = dict.fromkeys(("anchors", "picks", "pairs"), 0.0)
            for name, found in e["kernels"].items():
                known = [part for part in ("anchors", "picks") if name.endswith(part)]
                parts[known[0] if known else "anchors" if name.endswith("text") else "pairs"] += found["ms"]
            of_xla = e["xla_ms"] + e["xla_without_estimate_ms"]
            times = [f"{ms:,.1f} ms" for ms in (*parts.values(), of_xla)]
            name = {"forward": "forward", "backward": "forward + backward"}[way]
            whole = f"{e['total_ms']:,.1f} ms", f"{e['splash_ms']:,.1f} ms", f"{e['ratio']:.2f}x"
            rows.append([file["chip"].removeprefix("TPU "), str(e["cores"]), name, *whole, *times])
    return markdown(head, rows)


def estimate_parts_table(file: Entry) -> list[str]:
    """Lines of markdown: what each kernel of a chip's programs is expected to take."""
    rows = []
    for way, e in file["entries"].items():
        for name, found in sorted(e["kernels"].items(), key=lambda x: -x[1]["ms"]):
            rows.append([name, way, f"{found['calls']:.0f}", f"{found['cycles'] / 1e6:.2f}", f"{found['ms']:.2f} ms"])
        rows.append(["XLA's operations", way, "", "", f"{e['xla_ms']:.2f} ms"])
        rows.append(["those without its estimate", way, "", "", f"{e['xla_without_estimate_ms']:.2f} ms"])
    return markdown([f"{file['chip']}: part", "pass", "calls", "million cycles", "time"], rows)


def traffic_table(files: Iterable[Entry]) -> list[str]:
    """Lines of markdown: what a layer's operations move, by what they are for; files of benchmarks.tpu_step."""
    rows = []
    for file in files:
        for name, e in file["entries"].items():
            ways = e["forward"], e["backward"]
            kinds = {kind for way in ways for kind in way if kind not in ("kernels", "matrix products")}
            size = {kind: sum(way[kind]["gb"] for way in ways if kind in way) for kind in sorted(kinds)}
            rows.append([name, "all but kernels and products", *_moved(ways, kinds)])
            rows += [[name, kind, *_moved(ways, {kind})] for kind in sorted(size, key=lambda kind: -size[kind])]
    return markdown(["program", "for", "forward", "time", "backward", "time"], rows)


def _moved(ways: Sequence[Entry], kinds: Container[str]) -> list[str]:
    """GB and, where it is known, the time of some kinds in each pass."""
    cells = []
    for way in ways:
        found = [x for kind, x in way.items() if kind in kinds]
        times = [x["ms"] for x in found if "ms" in x]  # none before code is generated
        cells += [f"{sum(x['gb'] for x in found):.1f} GB", number(sum(times) if times else None, ".1f", " ms")]
    return cells


def _compiled(entries: Iterable[Entry], kernel: str, way: str) -> list[Entry]:
    return [e for e in entries if (e["kernel"], e["pass"]) == (kernel, way) and "error" not in e]


def _spills(entry: Entry) -> str:
    return f"{entry['spill_stores']:,} / {entry['spill_fills']:,}"


def setting_name(entry: Entry) -> str:
    """The setting, and how much it was shrunk."""
    return entry["setting"] + (f" / {entry['shrink']}" if entry["shrink"] > 1 else "")


def milliseconds(timing: Entry | None) -> str:
    """The median, and half of what lies between the least and the most."""
    if timing is None:
        return _EMPTY
    spread = (timing["high_ms"] - timing["low_ms"]) / 2
    return f"{timing['median_ms']:.4g} ms" + (f" ± {spread:.2g}" if timing["samples"] > 1 else "")


def number(value: float | None, style: str, unit: str = "") -> str:
    """A number, or nothing where there is none."""
    return _EMPTY if value is None else f"{value:{style}}{unit}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are set to the right; nothing if it has no rows."""
    rows = list(rows)
    if not rows:
        return []
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def separated(tables: Iterable[Sequence[str]]) -> list[str]:
    """All lines, with an empty one between two tables."""
    lines = [line for table in tables if table for line in (*table, _EMPTY)]
    return lines[:-1]


def _versus(way: Entry) -> list[str]:
    return [milliseconds(way["moc"]), milliseconds(way.get("dense")), number(way.get("ratio"), ".2f", "x")]


def _seconds(timing: Entry | None) -> str:
    return _EMPTY if timing is None else f"{timing['median_ms'] / 1e3:.4g} s"
