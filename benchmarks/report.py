#!/usr/bin/env python3
"""Makes one document and one page of what the benchmarks printed, and compares ratios with those of a former run.

    python3 benchmarks/report.py build/bench [--ratios benchmarks/ratios.json] [--update] [--strict]

Reads NAME.jsonl of every benchmark in that folder, as scripts/bench.sh leaves them there, and writes results.json and
report.html beside them. Needs nothing but Python.
"""
import argparse
import html
import json
import math
import pathlib
import sys

BENCHMARKS = ["collectives", "gloo_collectives", "layers", "image_insert", "training_step"]
WORSE = 1.25  # times the former ratio: marked


def read(folder):
    """{benchmark: its objects}, without those that didn't run, and the machine as the last of them describes it."""
    results, machine = {}, {}
    for name in BENCHMARKS:
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        objects = [json.loads(line) for line in lines if line.startswith("{")]
        if len(objects) > 1:
            machine.update(objects[0])
            results[name] = objects[1:]
    machine.pop("threads", None)  # what benchmark_collectives calls threads_per_rank
    return machine, results


# Ratios: less is better, and most of what is the machine's is divided out. They are of the least times: whatever else
# the machine does adds to a time and never takes away.

def least(line, key):
    return line[key]["min"]


def largest_messages(results, name):
    """(operation, dtype) -> what was measured with the largest size."""
    objects = results.get(name, [])
    largest = max((line["bytes"] for line in objects), default=0)
    return {(line["operation"], line["dtype"]): line for line in objects if line["bytes"] == largest}


def to_memcpy(messages, operation, dtype):
    return least(messages[operation, dtype], "milliseconds") / least(messages["memcpy", dtype], "milliseconds")


def collective_ratios(results):
    gloo = largest_messages(results, "gloo_collectives")
    ours = largest_messages(results, "collectives")
    ratios = {}
    for (operation, dtype), line in ours.items():
        if operation == "memcpy":
            continue
        name = f"collectives/{operation}/{dtype}"
        ratios[f"{name}/to_memcpy"] = to_memcpy(ours, operation, dtype)
        if (operation, dtype) in gloo:
            ratios[f"{name}/to_gloo"] = least(line, "milliseconds") / least(gloo[operation, dtype], "milliseconds")
    return ratios


def way_name(line):
    return "_".join(filter(None, [line["way"], line["projector_sharding"]]))


def timed_ways(results):
    return [line for line in results.get("image_insert", []) if "step_ms" in line]


def insert_setting(line):
    return line["dtype"], line["sequence"], line.get("scale", 1), line["features"]


def insert_ratios(results):
    ways = timed_ways(results)
    public = {insert_setting(line): line for line in ways if line["way"] == "public"}
    text = {insert_setting(line)[:3]: line for line in ways if line["way"] == "text_only"}
    ratios = {}
    for line in ways:
        if line["way"] in ("public", "text_only", "projector_gemm"):
            continue
        dtype, sequence, scale, features = setting = insert_setting(line)
        name = f"image_insert/{way_name(line)}/{features}/{dtype}/{sequence}" + (f"/scale {scale}" if scale > 1 else "")
        ratios[f"{name}/to_public"] = least(line, "step_ms") / least(public[setting], "step_ms")
        if features == "frozen":
            ratios[f"{name}/besides_products_to_text"] = (
                least(line, "non_gemm_ms") / least(text[setting[:3]], "non_gemm_ms"))
    return ratios


def training_ratios(results):
    lines = results.get("training_step", [])
    forward = {line["dtype"]: line for line in lines if line["part"] == "forward"}
    ratios = {}
    for line in lines:
        name = f"training_step/{line['part']}/{line['dtype']}"
        if line["part"] == "step":
            ratios[f"{name}/to_products"] = line["ratio_to_products"]
        elif line["part"] != "forward":
            ratios[f"{name}/to_forward"] = least(line, "ms") / least(forward[line["dtype"]], "ms")
    return ratios


def all_ratios(results):
    layers = {f"layers/{line['layer']}/{line['dtype']}/to_dense": least(line, "step_ms") / least(line, "dense_ms")
              for line in results.get("layers", [])}
    return {**collective_ratios(results), **layers, **insert_ratios(results), **training_ratios(results)}


def compare(ratios, former):
    """[(name, ratio or None, former ratio or None, remark)]"""
    rows = []
    for name in [*ratios, *(name for name in former if name not in ratios)]:
        now, then = ratios.get(name), former.get(name)
        remark = ""
        if now is None:
            remark = "not measured"
        elif then is None:
            remark = "new"
        elif now > then * WORSE:
            remark = f"WORSE by {now / then - 1:.0%}"
        elif then > now * WORSE:
            remark = f"better by {1 - now / then:.0%}"
        rows.append((name, now, then, remark))
    return rows


def number(value):
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def print_table(rows, file=sys.stdout):
    width = max(len(row[0]) for row in rows)
    print(f"{'ratio':{width}}  {'now':>8}  {'before':>8}", file=file)
    for name, now, then, remark in rows:
        print(f"{name:{width}}  {number(now):>8}  {number(then):>8}  {remark}".rstrip(), file=file)


# Plots: SVG whose colours are the page's, so that they follow light and dark.

CHARACTER = 6.6  # width of one, in the plots' font size


def text(x, y, content, anchor="start", kind="label"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(content)}</text>'


def rectangle(x, y, width, height, series, title):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" rx="1.5" '
            f'class="series{series}"><title>{html.escape(title)}</title></rect>')


def svg(width, height, parts):
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">' + "".join(parts) + "</svg>")


def legend(series):
    if len(series) < 2:
        return ""
    items = (f'<span><i class="series{index}"></i>{html.escape(name)}</span>' for index, name in enumerate(series))
    return f'<p class="legend">{"".join(items)}</p>'


def figure(title, series, drawing):
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{legend(series)}{drawing}</figure>"


def bars(title, unit, series, groups, line_at=None):
    """Groups of horizontal bars. groups: [(label, [value or None, one a series])]; line_at: a value to compare with."""
    bar, gap, plot = 13, 9, 560
    left = max(len(label) for label, _ in groups) * CHARACTER + 12
    top = 14 if line_at is not None else 2
    largest = max(value for _, values in groups for value in values if value is not None)
    scale = plot / max(largest, line_at or 0)
    parts, y = [], top
    for label, values in groups:
        middle = y + len(values) * bar / 2
        parts.append(text(left - 8, middle + 4, label, "end"))
        for index, value in enumerate(values):
            if value is not None:
                shown = f"{number(value)} {unit}".rstrip()
                parts.append(rectangle(left, y, value * scale, bar - 2, index, f"{label}, {series[index]}: {shown}"))
                parts.append(text(left + value * scale + 5, y + bar - 3.5, shown, kind="value"))
            y += bar
        y += gap
    if line_at is not None:
        x = left + line_at * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{y - gap + 2}" class="mark"/>')
        parts.append(text(x, top - 4, number(line_at), "middle", "value"))
    return figure(title, series, svg(left + plot + 90, y - gap + 6, parts))


def stacked(title, unit, series, groups):
    """One horizontal bar a group, its parts one after the other. groups: [(label, [value, one a series])]"""
    bar, gap, plot = 22, 10, 560
    left = max(len(label) for label, _ in groups) * CHARACTER + 12
    scale = plot / max(sum(values) for _, values in groups)
    parts, y = [], 2
    for label, values in groups:
        parts.append(text(left - 8, y + bar / 2 + 4, label, "end"))
        x = left
        for index, value in enumerate(values):
            parts.append(rectangle(x, y, value * scale - 1.5, bar, index, f"{label}, {series[index]}: "
                                   f"{number(value)} {unit}"))
            x += value * scale
        parts.append(text(x + 5, y + bar / 2 + 4, f"{number(sum(values))} {unit}", kind="value"))
        y += bar + gap
    return figure(title, series, svg(left + plot + 90, y, parts))


def size_name(num_bytes):
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"


def curves(title, series, points):
    """Milliseconds over bytes, both logarithmic. points: [[(bytes, milliseconds)], one list a series]"""
    width, height, left, bottom, top, right = 760, 280, 76, 34, 10, 34
    xs = sorted({x for curve in points for x, _ in curve})
    ys = [y for curve in points for _, y in curve]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def place(x, y):
        share = math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) if len(xs) > 1 else 0.5
        return (left + share * (width - left - right),
                height - bottom - (math.log10(y) - low) / (high - low) * (height - top - bottom))

    parts = []
    for decade in range(low, high + 1):
        _, y = place(xs[0], 10.0**decade)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(text(left - 8, y + 4, f"{10.0**decade:g} ms", "end", "value"))
    for x in xs:
        parts.append(text(place(x, 10.0**low)[0], height - bottom + 18, size_name(x), "middle", "value"))
    for index, curve in enumerate(points):
        places = [place(x, y) for x, y in sorted(curve)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="curve series{index}"/>')
        for (x, y), (num_bytes, milliseconds) in zip(places, sorted(curve)):
            hint = html.escape(f"{series[index]}, {size_name(num_bytes)}: {number(milliseconds)} ms")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="series{index}">'
                         f"<title>{hint}</title></circle>")
    return figure(title, series, svg(width, height, parts))


# The page.

def collective_plots(results):
    ours, gloo = largest_messages(results, "collectives"), largest_messages(results, "gloo_collectives")
    if not ours:
        return ""
    size = size_name(next(iter(ours.values()))["bytes"])
    series = ["MPI backend", "Gloo"] if gloo else ["MPI backend"]
    tables = [ours, gloo] if gloo else [ours]
    groups = [(f"{operation} {dtype}", [to_memcpy(table, operation, dtype) if (operation, dtype) in table else None
                                        for table in tables])
              for operation, dtype in ours if operation != "memcpy"]
    names = list(dict.fromkeys(line["operation"] for line in results["collectives"]))
    points = [[(line["bytes"], least(line, "milliseconds")) for line in results["collectives"]
               if line["operation"] == name and line["dtype"] == "float32"] for name in names]
    return (bars(f"Collectives of {size}: times a memcpy of the same bytes on all ranks at once", "", series, groups, 1)
            + curves("MPI backend, float32: time over bytes per rank", names, points))


def layer_plots(results):
    lines = results.get("layers", [])
    if not lines:
        return ""
    plots = ""
    for dtype in dict.fromkeys(line["dtype"] for line in lines):
        of_dtype = [line for line in lines if line["dtype"] == dtype]
        plots += bars(f"Layers, {dtype}, forward and backward of {of_dtype[0]['tokens']} tokens, ms", "ms",
                      ["over all ranks", "dense, one rank's share"],
                      [(line["layer"], [least(line, "step_ms"), least(line, "dense_ms")]) for line in of_dtype])
    return plots


def insert_plots(results):
    ways = timed_ways(results)
    plots = ""
    for setting in dict.fromkeys(insert_setting(line)[:3] for line in ways):
        groups = []
        for line in ways:
            if insert_setting(line)[:3] == setting:
                step = least(line, "step_ms")
                rest = min(least(line, "non_gemm_ms"), step)
                groups.append((f"{way_name(line)}, {line['features']}", [step - rest, rest]))
        sizes = f"{setting[1]} positions" + (f", sizes over {setting[2]}" if setting[2] > 1 else "")
        plots += stacked(f"Image insert, {setting[0]}, {sizes}: forward and backward, ms", "ms",
                         ["projector's matrix products", "everything else"], groups)
    return plots


def training_plots(results):
    lines = results.get("training_step", [])
    parts = list(dict.fromkeys(line["part"] for line in lines if line["part"] != "step"))
    groups = []
    for step in (line for line in lines if line["part"] == "step"):
        of_step = {line["part"]: least(line, "ms") for line in lines if line["dtype"] == step["dtype"]}
        label = f"{step['dtype']}, {step['tokens'] / least(step, 'ms') * 1000:.0f} tokens/s"
        groups.append((label, [of_step[part] for part in parts]))
    if not groups:
        return ""
    return stacked("Training step of a small Step3.7 by part, ms", "ms",
                   [part.replace("_", " ") for part in parts], groups)


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1f23; --faint: #667; --rule: #d8dade; --bad: #b3261e;
  --s0: #1f6fb2; --s1: #d9822b; --s2: #2e8b57; --s3: #8e5ea2; --s4: #b03a48; --s5: #6b7480; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --ink: #e6e8eb; --faint: #9aa3ad; --rule: #363a40; --bad: #ff8a80;
    --s0: #5aa9e6; --s1: #f0a04b; --s2: #5fbf8a; --s3: #b98fd0; --s4: #e57380; --s5: #99a3ae; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 1.5rem 0; overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: .4rem; }
.legend { margin: 0 0 .4rem; font-size: 13px; } .legend span { margin-right: 1.2rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg text.value { font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--rule); } .mark { stroke: var(--faint); stroke-dasharray: 3 3; }
""" + "".join(f".series{i} {{ fill: var(--s{i}); background: var(--s{i}); stroke: none; }}\n"
              f".curve.series{i} {{ fill: none; stroke: var(--s{i}); stroke-width: 2; }}\n" for i in range(6)) + """
table { border-collapse: collapse; font-size: 13px; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; }
td, th { border-bottom: 1px solid var(--rule); } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; }
tr.worse td { color: var(--bad); font-weight: 600; }
"""


def html_table(rows):
    lines = ['<table><tr><th>ratio</th><th class="number">now</th><th class="number">before</th><th></th></tr>']
    for name, now, then, remark in rows:
        kind = ' class="worse"' if remark.startswith("WORSE") else ""
        lines.append(f'<tr{kind}><td>{html.escape(name)}</td><td class="number">{number(now)}</td>'
                     f'<td class="number">{number(then)}</td><td>{html.escape(remark)}</td></tr>')
    return "\n".join(lines) + "</table>"


def describe(machine):
    """One line about it."""
    speeds = machine.get("gemm_gigaflops_per_rank", {})
    products = [f"{name} products: {speed:.0f} GFLOP/s a rank" for name, speed in speeds.items()]
    return ", ".join([machine.get("cpu", "unknown"), machine.get("instruction_set", ""),
                      f"ranks: {machine.get('ranks', '?')}", f"threads a rank: {machine.get('threads_per_rank', '?')}",
                      *products])


def page(machine, results, rows, former_machine):
    sections = [("Layers beside dense LibTorch", layer_plots(results)),
                ("Training step", training_plots(results)),
                ("Image insert", insert_plots(results)),
                ("Collectives", collective_plots(results))]
    body = "".join(f"<h2>{title}</h2>\n{plots}\n" for title, plots in sections if plots)
    before = f"<p>Before: {html.escape(describe(former_machine))}.</p>" if former_machine else ""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>megatron_cpp benchmarks</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
            f"<h1>megatron_cpp benchmarks</h1>\n<p>{html.escape(describe(machine))}. "
            f"All times are the least of several rounds.</p>\n{body}"
            f"<h2>Ratios</h2>\n<p>Of the least times; less is better. "
            f"Marked is what got worse by more than {WORSE - 1:.0%}.</p>{before}\n"
            f"{html_table(rows)}\n</body></html>\n")


def write_json(path, document):
    path.write_text(json.dumps(document, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="with NAME.jsonl of the benchmarks")
    parser.add_argument("--ratios", type=pathlib.Path, help="those to compare with")
    parser.add_argument("--update", action="store_true", help="write this run's to that file")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if one got worse by more than 25 %%")
    arguments = parser.parse_args()
    if arguments.update and not arguments.ratios:
        parser.error("--update needs --ratios")

    machine, results = read(arguments.folder)
    if not results:
        raise SystemExit(f"no benchmark's lines in {arguments.folder}")
    former = {"machine": {}, "ratios": {}}
    if arguments.ratios and arguments.ratios.exists():
        former = json.loads(arguments.ratios.read_text())
    ratios = all_ratios(results)
    rows = compare(ratios, former["ratios"])
    write_json(arguments.folder / "results.json", {"machine": machine, "benchmarks": results})
    (arguments.folder / "report.html").write_text(page(machine, results, rows, former["machine"]))

    print(f"now:    {describe(machine)}")
    if former["machine"]:
        print(f"before: {describe(former['machine'])}")
    print_table(rows)
    print(f"written: {arguments.folder / 'results.json'}, {arguments.folder / 'report.html'}")
    comparable = not former["machine"] or former["machine"].get("ranks") == machine.get("ranks")
    if not comparable:
        print("The ratios before are of another number of ranks: they say nothing about these.")
    worse = [row for row in rows if comparable and row[3].startswith("WORSE")]
    if worse:
        print(f"{len(worse)} of {len(rows)} ratios got worse by more than {WORSE - 1:.0%}. "
              "On a shared machine, run again before believing it.")
    if arguments.update:
        write_json(arguments.ratios, {"machine": machine, "ratios": {k: float(f"{v:.4g}") for k, v in ratios.items()}})
        print(f"{arguments.ratios} has the new ratios")
    return 1 if arguments.strict and worse else 0


if __name__ == "__main__":
    sys.exit(main())
