"""The charts of a report: distance, loss, speed, update, epsilon; each over rounds or steps."""

from server.report.formatting import format_number
from server.report.svg_charts import Series, line_chart
from server.runs.history import Evaluation, RunData
from shared.storage.round_records import dp_epsilon

Chart = tuple[str, str]
"""Title and SVG."""


def distance_chart(data: RunData, groups: list[list[Evaluation]]) -> list[Chart]:
    """One chart per metric and reference that was measured more than once."""
    charts = []
    for group in groups:
        if len(group) > 1:
            metric = group[0].distance_name
            svg = line_chart([distance_series(group, metric)], data.place, metric, from_zero=True)
            charts.append((f"{metric} by {data.place}", svg))
    return charts


def distance_series(group: list[Evaluation], label: str) -> Series:
    """Distances over rounds or steps, with the interval where one was asked for."""
    bars = [None if each.interval is None else (each.interval[0], each.interval[1]) for each in group]
    return Series(label, [float(each.place) for each in group], [each.value for each in group], bars)


def training_charts(data: RunData) -> list[Chart]:
    """What was logged while training, centrally or at the sites."""
    charts = []
    if steps := data.of_kind("train"):
        loss = Series("loss", [event["step"] for event in steps], [event.get("loss") for event in steps])
        rate = [event.get("images_per_second") for event in steps]
        charts.append(("Training loss", line_chart([loss], "step", "loss", log_y=_is_wide(loss.y))))
        speed = Series("images/s", loss.x, rate)
        charts.append(("Speed", line_chart([speed], "step", "images / s", from_zero=True)))
    if losses := _site_losses(data):
        charts.append(("Loss at the sites", line_chart(losses, "round", "loss")))
    if held_out := _held_out_losses(data):
        charts.append(("Held-out loss", line_chart(held_out, "round", "loss")))
    if data.rounds:
        x = [float(event["round"]) for event in data.rounds]
        norms = Series("update", x, [event.get("update_norm") for event in data.rounds])
        charts.append(("Size of the global update", line_chart([norms], "round", "L2 norm", from_zero=True)))
    return charts


def epsilon_chart(data: RunData) -> Chart | None:
    """Epsilon of the releases with DP at each site over the rounds, and the caps; None where nobody released any."""
    lines, caps = [], {}
    for site in data.sites:
        points = []
        for event in data.rounds:
            for entry in event.get("answered", []):
                value = dp_epsilon(entry) if entry["site"] == site else None
                if value is not None:
                    points.append((float(event["round"]), value))
                    if entry.get("epsilon_cap"):
                        caps[site] = float(entry["epsilon_cap"])
        if points:
            lines.append(Series(site, [x for x, _ in points], [y for _, y in points]))
    if not lines:
        return None
    last = max(max(line.x) for line in lines)
    first = min(min(line.x) for line in lines)
    if first == last:  # A cap of one round has a length, too.
        first, last = first - 0.4, last + 0.4
    for cap in sorted(set(caps.values())):
        whose = "" if len(set(caps.values())) == 1 else f" of {', '.join(s for s, own in caps.items() if own == cap)}"
        lines.append(Series(f"cap {format_number(cap)}{whose}", [first, last], [cap, cap], is_limit=True))
    return "Epsilon spent, with differential privacy", line_chart(lines, "round", "epsilon", from_zero=True)


def comparison(runs: list[tuple[RunData, list[Evaluation]]]) -> str:
    """Headline distances of several runs in one chart, where they measured the same thing; else empty."""
    measured = [(data, group) for data, group in runs if group]
    if len({(group[0].group, data.place) for data, group in measured}) != 1:
        return ""
    lines = [distance_series(group, data.name) for data, group in measured]
    data, group = measured[0]
    return line_chart(lines, data.place, group[0].distance_name, from_zero=True)


def _site_losses(data: RunData) -> list[Series]:
    """Losses that sites released, one line each; most policies release none."""
    lines = []
    for site in data.sites:
        points = [
            (event["round"], entry.get("scalars", {}).get("loss"))
            for event in data.rounds
            for entry in event["answered"]
            if entry["site"] == site
        ]
        if any(loss is not None for _, loss in points):
            lines.append(Series(site, [place for place, _ in points], [loss for _, loss in points]))
    return lines


def _held_out_losses(data: RunData) -> list[Series]:
    """What each round's check found, one line a group; empty where nothing watched the run."""
    watched = [event for event in data.rounds if event.get("held_out")]
    x, groups = (
        [float(event["round"]) for event in watched],
        sorted({key for each in watched for key in each["held_out"]}),
    )
    return [Series(group, x, [event["held_out"].get(group) for event in watched]) for group in groups]


def _is_wide(values: list[float | None]) -> bool:
    positive = [value for value in values if value is not None and value > 0]
    return bool(positive) and max(positive) > 10 * min(positive)
