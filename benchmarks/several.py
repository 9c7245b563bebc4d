"""The table of several GPUs: what was measured beside what was planned."""

from benchmarks.tables import Entry, markdown, number

_OF_PLAN = {"context": "training, context", "fsdp": "training, fsdp", "sampling": "denoising, context"}


def several_table(entries: dict[str, Entry], planned: dict[str, Entry]) -> list[str]:
    """Lines of markdown: steps over several GPUs as measured, by name, beside what the plan says of them; and what it
    says of numbers of GPUs that were not measured.

    Args:
        entries: of benchmarks.scaling; those with `first_step` are from before it left a run's first step out.
        planned: of benchmarks.plan_h200.
    """
    head = [
        "step",
        "GPUs",
        "heads x tokens",
        "remat",
        "ms",
        "tokens/s",
        "times one GPU",
        "GiB",
        "collectives: ms",
        "alone",
    ]
    rows = []
    for name, e in sorted(entries.items(), key=lambda item: item[1]["devices"]):
        kind = name.partition(",")[0]
        split = "" if kind == "fsdp" else "x".join(map(str, e["groups"]))
        split += f", {e['exchange']}" if e["groups"][1] > 1 else ""
        remat = "" if kind == "sampling" else e["model"]["remat"]
        step = f"{kind}, first step" if e.get("first_step") else kind
        row = [step, str(e["devices"]), split, remat, f"{e['ms']:,.0f}", f"{e['tokens_per_second']:,.0f}"]
        row += [number(times_one(kind, e, entries), ".2f", "x"), f"{e['gib']:.1f}"]
        row += [number(e.get(key), ",.0f") for key in ("collectives_ms", "alone_ms")]
        plan = planned.get(f"{_OF_PLAN.get(kind)} {e['devices']}", {})
        # It is of as many head groups as can be, and of later steps.
        alike = e["groups"][1] == 1 and remat in ("", plan.get("remat")) and not e.get("first_step")
        plan = plan.get("step_ms") if alike else None
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
                    plan["remat"] if kind != "sampling" else "",
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
    """How often a single GPU's rate an entry's is; None: that was not measured, of the same model and step of a run."""

    def model(of: Entry) -> Entry:
        """Whatever a call of it alone recomputes, it is the same."""
        return of["model"] | ({"remat": ""} if kind == "sampling" else {})

    kind = "context" if kind == "fsdp" else kind
    for name, one in entries.items():
        alike = one.get("first_step") == entry.get("first_step") and model(one) == model(entry)
        if name.startswith(f"{kind},") and one["devices"] == 1 and alike:
            return entry["tokens_per_second"] / one["tokens_per_second"]
    return None
