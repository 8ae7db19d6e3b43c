"""Tables of agreement with other tools, for results.md, from the records of `benchmarks/`."""

from __future__ import annotations

from results_tables import record_of


def peers() -> list[str]:
    """Largest relative differences from mergekit by method, over its recipes."""
    record = record_of("peers", "peer", "mergekit")
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    written = record["float32"]["recipes"] + record["float32_selecting"]["recipes"]  # the other results have no recipes
    methods = {result["name"]: result["recipe"]["merge_method"] for result in written}
    for stored in ("float32", "bfloat16"):
        for result in record[stored]["recipes"] + record[f"{stored}_selecting"]["recipes"]:
            kinds = found.setdefault(methods[result["name"]], {})
            kinds.setdefault((stored, result["output_dtype"]), []).append(result["max_relative_difference"])
    lines = [
        "| method | recipes | float32 models | float32 models, bfloat16 output | bfloat16 models |",
        "|---|---|---|---|---|",
    ]
    for method, kinds in found.items():
        cells = [
            f"{max(kinds[key]):.1e}" if key in kinds else ""
            for key in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
        ]
        count = sum(len(own) for (stored, _), own in kinds.items() if stored == "float32")
        lines.append(f"| {method} | {count} | {' | '.join(cells)} |")
    return lines


def forms() -> list[str]:
    """Differences from mergekit form by form of its dialect, where both take it."""
    record = record_of("peers", "peer", "mergekit")
    results = [each for each in record["forms"] + record["dialect"] if "refused" not in each]
    return [
        "| form | largest difference |",
        "|---|---|",
        *(f"| {each['name']} | {each['max_relative_difference']:.1e} |" for each in results),
    ]


def vocabularies() -> list[str]:
    """Largest relative differences from mergekit where models have other vocabularies, rows paired by token."""
    record = record_of("peers", "peer", "mergekit, vocabularies")
    lines = ["| recipe | method | rows | output table stored | tied |", "|---|---|---|---|---|"]
    for stored, tied in zip(record["untied"], record["tied"], strict=True):
        cells = [f"{each['max_relative_difference']:.1e}" for each in (stored, tied)]
        lines.append(
            f"| {stored['name']} | {stored['recipe']['merge_method']} | {stored['rows']} | {' | '.join(cells)} |"
        )
    return lines


def fusion_bench() -> list[str]:
    """Largest relative differences from FusionBench, method by method, and why they are what they are."""
    record = record_of("peers", "peer", "FusionBench")
    lines = [
        "| method | largest relative difference | values that differ | with FusionBench's rule | whose choice, with the formula |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "refused" in row:
            cells = [f"FusionBench fails ({row['refused'].split(':')[0]})", "", ""]
        else:
            rule = f"{row['with_their_rule']:.1e}" if "why" in row and "with_their_rule" in row else ""
            cells = [f"{row['max_relative_difference']:.1e}", f"{row['values_unequal']} of {row['values']:,}", rule]
        why = (row.get("why") or row.get("note", "")).replace("|", "\\|")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {why} |")
    return lines
