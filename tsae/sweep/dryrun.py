"""What a launch would do, in words: points, stages and why they run or not, GPU-hours, and a scheduler's scripts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tsae.config.points import shown
from tsae.sweep import schedulers
from tsae.sweep.attempt import Attempt
from tsae.sweep.cluster import Cluster, load_cluster
from tsae.sweep.cost import cost_of_launch
from tsae.sweep.launcher import Choice, Options, choose, container_for, require_packages, resolve, submission_of
from tsae.sweep.plan import Plan
from tsae.sweep.resources import StageResources
from tsae.sweep.stage import Stage

REFUSED = "refused: "
"""How the line begins that says what cannot fit."""


def dry_run(plan: Plan, options: Options) -> list[str]:
    """The lines; nothing is written and nothing is started."""
    asked = options.executor
    scheduler = schedulers.find(asked) if asked in schedulers.SCHEDULERS else resolve(asked)
    executor = scheduler.name if scheduler else "debug" if asked == "debug" else "local"
    site = load_cluster(options.cluster) if scheduler or options.cluster else Cluster()
    choice = choose(plan, executor, options.retry_failed)
    image = container_for(plan, options, site, executor)
    if image is None:
        require_packages(plan, choice.start)
    report = plan.report()
    stages = [*choice.start, *([report] if report and choice.start else [])]
    lines = [f"{plan.name}: {len(plan.points)} points", *_points(plan), ""]
    every = [*plan.stages, *([report] if report else [])]
    counted, to_run = (sum(len(stage.apart) for stage in some) for some in (every, stages))
    lines += [f"{counted} stages, {to_run} to run", *_stages(every, choice, stages), ""]
    cost = cost_of_launch(plan, choice.start, site if scheduler else None)
    lines += [*cost.lines, *_gpu_hours(choice.start, site)]
    if options.probe:
        from tsae.sweep.probe import probe

        lines += probe(cost.works)
    if scheduler and stages:
        attempt = Attempt(plan.folder / "attempts" / time.strftime("%Y%m%d-%H%M%S"))
        submission = submission_of(plan, scheduler, attempt, site, image, choice, options)
        for text in submission.texts(stages, scheduler.limits() if scheduler.answers() else None):
            lines += ["", f"----- {scheduler.command}", text.rstrip(), "-----", ""]
    lines += [f"results: {plan.folder}", "dry run: nothing was started", *(f"{REFUSED}{why}" for why in cost.refused)]
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _points(plan: Plan) -> list[str]:
    axes = list(dict.fromkeys(key for point in plan.points for key in point.axes))
    rows = [["point", *axes]]
    rows += [[point.name, *(shown(point.value(key)) for key in axes)] for point in plan.points]
    return table(rows)


def _stages(every: Sequence[Stage], choice: Choice, to_run: Sequence[Stage]) -> list[str]:
    verdicts = {stage.key: "to run" for stage in to_run}
    for stage in choice.left:
        verdicts[stage.key] = f"left alone: {choice.standings[stage.key].state}"
    for stage in choice.failed:
        verdicts[stage.key] = f"failed, not tried again without --retry-failed: {choice.standings[stage.key].error}"
    for stage in choice.blocked:
        verdicts[stage.key] = "blocked: needs one that failed or that another executor has"
    for stage in choice.start:
        standing = choice.standings[stage.key]
        if standing.state not in ("waiting", "blocked"):
            verdicts[stage.key] += f", {standing.state} before" if standing.state in ("failed", "interrupted") else ""
            verdicts[stage.key] += f"; {standing.state} on {standing.host}" if standing.state == "running" else ""
    rows = [["stage", "subject", "points", "state"]]
    for stage in every:
        unasked = "once the others have ended" if stage.after_failures else "not needed: what reads it is complete"
        verdict = verdicts.get(stage.key) or ("complete" if stage.is_done() else unasked)
        one, *behind = stage.apart
        rows.append([one.kind, one.subject, str(len(one.points) or ""), verdict])
        for other in behind:
            rows.append([other.kind, other.subject, str(len(other.points)), f"in the job of {one.label}"])
    return table(rows)


def _gpu_hours(stages: Sequence[Stage], site: Cluster) -> list[str]:
    """GPU-hours that the time limits allow at most."""
    hours, unlimited = 0.0, 0
    for stage in stages:
        resources: StageResources = site.resources_of(stage.kind, stage.resources)
        gpus = (resources.gpus or 0) * (resources.nodes or 1)
        if gpus and resources.minutes is None:
            unlimited += 1
        hours += gpus * (resources.minutes or 0) / 60
    rest = f", and {unlimited} GPU stages without a time limit" if unlimited else ""
    return [f"GPU-hours asked for: {hours:g}{rest}"]
