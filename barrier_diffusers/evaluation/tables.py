"""The tables that the scripts print."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from barrier_diffusers.utils.shown_text import plain_console


def print_metrics(metrics: Mapping[str, Any], attribute: str, forgotten: Sequence[str]) -> None:
    """The table of what was forgotten and what was kept."""
    table = Table(title=f"{attribute}: forgotten {', '.join(forgotten)}")
    for heading in ("", "before", "after", "95 % interval after"):
        table.add_column(heading, justify="left" if heading == "" else "right")

    def add(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], style: str | None = None) -> None:
        first = f"{before['value']:.1f}" if before else ""
        table.add_row(name, first, f"{after['value']:.1f}", interval(after), style=style)

    details = metrics["details"]
    before, after = details.get(f"per_{attribute}_before", {}), details[f"per_{attribute}_after"]
    for label in sorted(after, key=lambda label: label not in forgotten):
        add(label, before.get(label), after[label], "red" if label in forgotten else None)
    table.add_section()
    add("all retained labels", details.get("retain_accuracy_before"), details["retain_accuracy_after"], "bold")
    for key in details:
        if key.endswith("_accuracy_after") and key not in ("retain_accuracy_after", "forget_accuracy_after"):
            name = key.removesuffix("_accuracy_after").replace("_", " ")
            add(name, details.get(key.replace("_after", "_before")), details[key])
    plain_console().print(table)
    retained = f"retain accuracy {metrics['retain_accuracy_after']:.1f} %"
    if "retain_accuracy_drop" in metrics:
        retained = f"retain accuracy drop {metrics['retain_accuracy_drop']:.1f} points"
    print(
        f"unlearning accuracy {metrics['unlearning_accuracy']:.1f} % "
        f"({details['unlearning_accuracy']['num_images']} images), {retained} "
        f"({details['retain_accuracy_after']['num_images']} images)"
    )


NOT_ERASED = 80.0  # an unlearning accuracy, in percent, from which on down a run says that it has not erased


def warn_if_not_erased(unlearning_accuracy: float, forgotten: Sequence[str], instead: str) -> None:
    """One line on stderr where more than a fifth of the images that were asked for what is forgotten still show it.

    Args:
        unlearning_accuracy: in percent.
        instead: what to change.
    """
    if unlearning_accuracy < NOT_ERASED:
        print(
            f"warning: not erased: {100 - unlearning_accuracy:.0f} % of the images asked for {' or '.join(forgotten)} "
            f"still show it: {instead}",
            file=sys.stderr,
        )


def erase_more(settings: Any, otherwise: str = "choose another anchor or objective") -> str:
    """What a run that trains can change if it has not erased, to follow "not erased:".

    Args:
        settings: of an unlearning run.
        otherwise: what helps if nothing of that does.
    """
    more = ["raise max_train_steps or learning_rate"]
    if settings.protected and settings.barrier.has_penalty:
        more.append(f"lower barrier.lambda_interval (it is {settings.barrier.lambda_interval:g})")
        if not settings.barrier.use_actual_bounds:
            more.append("set barrier.use_actual_bounds")
    return f"{', '.join(more)}, or {otherwise}"


def interval(counted: Mapping[str, Any]) -> str:
    """The 95 % interval of a share, in percent."""
    low, high = counted["interval_95"]
    return f"{low:.1f} - {high:.1f}"


def print_attacks(results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
    """The table of what each attack brought back, and under it how long each took; `seconds` by the attack's name."""
    table = Table(title="images recognised as the forgotten concept, in %")
    for heading in ("attack", "concept", "plain prompts", "attacked", "95 % interval", "images"):
        table.add_column(heading, justify="left" if heading in ("attack", "concept") else "right")
    for result in results:
        before, after = result["pre_attack"], result["post_attack"]
        cells = [f"{before['value']:.1f}", f"{after['value']:.1f}", interval(after), str(after["num_images"])]
        table.add_row(result["attack"], result["concept"], *cells)
    plain_console().print(table)
    print("seconds: " + ", ".join(f"{attack} {passed:.0f}" for attack, passed in seconds.items()))


def print_gaps(gaps: Sequence[Mapping[str, Any]]) -> None:
    """The table of erased model and control under the same attacks: shares in percent, the gap in points; "early" is
    the mean over the early marks."""
    table = Table(title="erased model and control under attack: images that show the concept, in %")
    for heading in ("attack", "concept", "at", "erased", "control", "gap", "95 % interval"):
        justify: Literal["left", "right"] = "left" if heading in ("attack", "concept", "at") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "at")
    for gap in gaps:
        names = [gap["attack"], gap["concept"]]
        if "failed" in gap:
            table.add_row(*names, "failed", *("" if side in gap["failed"] else "-" for side in ("erased", "control")))
            continue
        several = len(gap["marks"]) > 1
        rows = {f"{steps} steps": found for steps, found in gap["marks"].items() if several}
        rows["strongest"] = gap["strongest"]
        early = {"strongest, early": "mean_strongest", "mean, early": "mean_attackers"}
        rows |= {shown: gap[name] for shown, name in early.items() if several and name in gap}
        for at, found in rows.items():
            points = found.get("gap", found)
            shares = [f"{found[side]['value']:.1f}" if side in found else "" for side in ("erased", "control")]
            ends = interval(points) if points["interval_95"] is not None else ""
            table.add_row(*names, at, *shares, f"{points['value']:+.1f}", ends)
            names = ["", ""]
        table.add_section()
    plain_console().print(table)
    for gap in gaps:
        half = gap.get("half", {})
        if "ratio" in half:
            bound = {None: "", "at_least": "at least ", "at_most": "at most "}[half["bound"]]
            print(
                f"{gap['attack']}, {gap['concept']}: half of the images after {bound}{half['ratio']:.2f} times the "
                "control's steps"
            )


def print_values(title: str, values: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of numbers, by "before" (if known) and "after"; nothing if there are none. A {mean, std} is one number,
    and what is no number is left out."""

    def written(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{value['mean']:.4g} ± {value['std']:.2g}"
        return str(value) if isinstance(value, int) else f"{value:.4g}"

    table = Table(title=title)
    for heading in ("", *values):
        table.add_column(heading, justify="left" if heading == "" else "right")
    names = [name for name in values.get("after", {}) if name != "details"]
    for name in names:
        table.add_row(name.replace("_", " "), *(written(column[name]) for column in values.values()))
    if names:
        plain_console().print(table)


def print_membership(found: Mapping[str, Any]) -> None:
    """How well the denoising loss tells trained images from held-out ones; an area of 0.5 is a guess."""
    table = Table(title="membership inference: trained or held out, by the denoising loss")
    for heading in ("images", "when", "area under ROC", "95 % interval", "found, %", "loss trained", "loss held out"):
        justify: Literal["left", "right"] = "left" if heading in ("images", "when") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading.startswith("95 %"))
    for when in (name for name in ("before", "after") if name in found):
        for role, results in found[when].items():
            low, high = results["auc"]["interval_95"]
            numbers = [f"{results['auc']['value']:.3f}", f"{low:.3f} - {high:.3f}"]
            numbers += [f"{results['true_positive_rate']['value']:.1f}"]
            numbers += [f"{results[side]:.4f}" for side in ("loss_members", "loss_held_out")]
            table.add_row(role, when, *numbers)
    for role, results in found.get("change", {}).items():
        low, high = results["auc"]["interval_95"]
        table.add_row(role, "change", f"{results['auc']['value']:+.3f}", f"{low:+.3f} - {high:+.3f}")
    plain_console().print(table)
