"""The table of several GPUs: what was measured beside what was planned."""

from benchmarks.tables import Entry, markdown, number

_OF_PLAN = {"context": "training, context", "fsdp": "training, fsdp", "sampling": "denoising, context"}


def several_table(entries: dict[str, Entry], planned: dict[str, Entry]) -> list[str]:
    """Lines of markdown: steps over several GPUs as measured, by name, beside what the plan says of them; and what it
    says of numbers of GPUs that were not measured.

    Args:
        entries: of benchmarks.scaling.
        planned: of benchmarks.plan_h200.
    """
    head = ["step", "GPUs", "heads x tokens", "ms", "tokens/s", "times one GPU", "GiB", "collectives: ms", "alone"]
    rows = []
    for name, e in sorted(entries.items(), key=lambda item: item[1]["devices"]):
        kind = name.partition(",")[0]
        split = "" if kind == "fsdp" else "x".join(map(str, e["groups"]))
        split += f", {e['exchange']}" if e["groups"][1] > 1 else ""
        row = [kind, str(e["devices"]), split, f"{e['ms']:,.0f}", f"{e['tokens_per_second']:,.0f}"]
        row += [number(times_one(kind, e, entries), ".2f", "x"), f"{e['gib']:.1f}"]
        row += [number(e.get(key), ",.0f") for key in ("collectives_ms", "alone_ms")]
        of_plan = planned if e["groups"][1] == 1 else {}  # which is of as many head groups as there can be
        plan = of_plan.get(f"{_OF_PLAN.get(kind)} {e['devices']}", {}).get("step_ms")
        rows.append([*row, number(plan, ",.0f"), number(plan and plan / e["ms"] - 1, "+.1%")])
    measured = {(name.partition(",")[0], e["devices"]) for name, e in entries.items()}
    one = {kind: planned.get(f"{name} 1") for kind, name in (_OF_PLAN | {"fsdp": _OF_PLAN["context"]}).items()}
    for kind, name in _OF_PLAN.items():
        for planned_name, plan in planned.items():
            count = int(planned_name.rpartition(" ")[2])
            if planned_name.startswith(name) and count > 1 and (kind, count) not in measured and (alone := one[kind]):
                scenes = count if kind == "fsdp" else 1
                times = f"{scenes * alone['step_ms'] / plan['step_ms']:.2f}x"
                row = [
                    kind,
                    str(count),
                    "",
                    "not measured",
                    "",
                    times,
                    f"{plan['bytes'] / 2**30:.1f}",
                    "",
                    "",
                ]
                rows.append([*row, f"{plan['step_ms']:,.0f}", ""])
    return markdown([*head, "planned: ms", "off by"], rows)


def times_one(kind: str, entry: Entry, entries: dict[str, Entry]) -> float | None:
    """How often a single GPU's rate an entry's is; None: that was not measured, of the same model."""
    step = "context, 1 devices, 1x1" if kind in ("context", "fsdp") else f"{kind}, 1 devices"
    one = entries.get(step)
    if one is None or one.get("model") != entry.get("model"):
        return None
    return entry["tokens_per_second"] / one["tokens_per_second"]
