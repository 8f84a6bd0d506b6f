"""The report of a run: one HTML page that stands alone and can be read by somebody who has never seen the project.

`write_report` is the command's function. The page needs no network and no script; `assets/` has its frame and style.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template

from resilience.observe import plots
from resilience.observe.events import scan_events
from resilience.observe.phrases import human_bytes, human_seconds, plural, tier_words
from resilience.observe.svg import tag
from resilience.observe.timeline import Event, Interruption, Run, Save, run_of, stalls_of
from resilience.observe.timeline_chart import timeline as timeline_chart

_MAX_ROWS = 200


def write_report(paths: Iterable[Path], page: Path) -> Run:
    """Read events (files, or directories of them), write the page, return what it tells. Raises `OSError`."""
    scan = scan_events(paths)
    run = run_of(scan.events)
    page.parent.mkdir(parents=True, exist_ok=True)
    # an event may hold half a character, which JSON can write and UTF-8 cannot
    page.write_text(render(run, skipped=scan.skipped), encoding="utf-8", errors="backslashreplace")
    return run


def render(run: Run, skipped: int = 0) -> str:
    """The whole page as text."""
    assets = files("resilience.observe") / "assets"
    frame = Template((assets / "report.html").read_text(encoding="utf-8"))
    verdict_class, headline, sentence = _verdict(run)
    sections = [
        _tiles(run),
        _timeline_section(run),
        _breaks_section(run),
        _loss_section(run),
        _spent_section(run),
        _saves_section(run),
        _proof_section(run),
        _notes_section(run, skipped),
    ]
    return frame.substitute(
        style=(assets / "report.css").read_text(encoding="utf-8"),
        title=escape(f"{headline} – run {run.run_id}" if run.run_id else headline),
        verdict_class=verdict_class,
        headline=escape(headline),
        sentence=escape(sentence),
        shape=escape(_shape(run)),
        body="\n".join(section for section in sections if section),
    )


def _shape(run: Run) -> str:
    names = plural(len(run.nodes), "node")
    return f"{plural(run.world_size, 'process').replace('processs', 'processes')} on {names} · run “{run.run_id}”"


def _verdict(run: Run) -> tuple[str, str, str]:
    """(class, headline, sentence)."""
    broke = len(run.interruptions)
    times = {1: "once", 2: "twice"}.get(broke, f"{broke} times")
    often = f"although it was interrupted {times}" if broke else "undisturbed"
    if run.verdict is not None:
        if run.verdict.get("passed") and run.verdict.get("why_not_bits"):
            return "good", "Rehearsal passed", f"Training finished iteration {run.finished}, {often}. {_compared(run)}"
        if run.verdict.get("passed"):
            return (
                "good",
                "Rehearsal passed",
                (
                    f"Training finished iteration {run.finished}, {often}, and ended in exactly the state of a run to "
                    "which nothing had happened: every bit of it is equal."
                ),
            )
        problems = [str(problem) for problem in run.verdict.get("problems") or []]
        return "bad", "Rehearsal failed", " ".join(problems) or "The reason was not noted."
    if run.finished is not None:
        return "good", "Training finished", f"It reached iteration {run.finished}, {often}."
    if run.stopped is not None:
        return "good", "Training stopped on request", f"It saved at iteration {run.stopped} and can be resumed there."
    if not run.attempts:
        return "bad", "No training in sight", "The events given tell of no attempt at training."
    return "bad", "Training has not finished", f"It was last seen at iteration {run.reached}; it may still be running."


def _compared(run: Run) -> str:
    """What of the end can be held against an undisturbed run's, where its bits cannot."""
    verdict = run.verdict or {}
    difference = verdict.get("loss_difference")
    why = f"Its bits are not compared with an undisturbed run’s: {verdict.get('why_not_bits')}."
    return why if difference is None else f"{why} The loss stays within {100 * float(difference):.1f} % of that run’s."


def _tiles(run: Run) -> str:
    lost, broke = sum(interruption.lost for interruption in run.interruptions), len(run.interruptions)
    stalls = stalls_of(run.saves)
    tiles = [
        (f"{run.reached:,}", "iterations", "finished, each counted once"),
        (str(broke), "interruption" if broke == 1 else "interruptions", "training was cut off and came back"),
        (f"{lost:,}", "iterations lost", "done again after an interruption"),
        (f"{100 * run.goodput:.0f} %", "goodput", f"of {human_seconds(run.spent.wall)} went into training that counts"),
    ]
    if stalls:
        tiles.append((human_seconds(median(stalls)), "wait per save", "training pauses so long for a typical save"))
    shown = (
        tag("li", tag("b", escape(figure)), tag("span", escape(what)), tag("small", escape(meaning)))
        for figure, what, meaning in tiles
    )
    return tag("ul", *shown, class_="tiles")


def _section(name: str, heading: str, sentence: str, *parts: str) -> str:
    return tag(
        "section", tag("h2", escape(heading), id=name), tag("p", sentence, class_="lead"), *parts, aria_labelledby=name
    )


def _timeline_section(run: Run) -> str:
    if not run.attempts:
        return ""
    lead = (
        "The line climbs as training gets on. Where something breaks (a numbered flag) training stops, and goes on "
        "from the newest save that is complete; what was done after that save is lost and done again."
    )
    legend = _legend(
        [
            ("train", "training that counts"),
            ("again", "training that was lost and done again"),
            ("starting", "starting up, looking for saves, loading"),
            ("away", "from what broke to the next step"),
            ("resumed round", "where training went on"),
            ("dot", "a save kept on the nodes"),
            ("square", "a persistent checkpoint"),
        ]
    )
    return _section("timeline", "What happened", lead, _figure(timeline_chart(run)), legend, _attempts_table(run))


def _figure(svg: str) -> str:
    return tag("figure", tag("div", svg, class_="scroll", tabindex=0, role="group", aria_label="chart, scrollable"))


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    keys = (tag("li", tag("i", class_=f"key {name}", aria_hidden="true"), escape(meaning)) for name, meaning in entries)
    return tag("ul", *keys, class_="legend")


def _details(summary: str, *parts: str) -> str:
    return tag("details", tag("summary", escape(summary)), *parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = rows[:_MAX_ROWS]
    cut = f"The first {_MAX_ROWS:,} of {len(rows):,} rows." if len(rows) > _MAX_ROWS else ""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", cut) if cut else "",
            tag("thead", tag("tr", *(tag("th", escape(name), scope="col") for name in head))),
            tag("tbody", *(tag("tr", *(tag("td", escape(cell)) for cell in row)) for row in shown)),
        ),
        class_="scroll",
        tabindex=0,
        role="group",
        aria_label="table, scrollable",
    )


def _attempts_table(run: Run) -> str:
    rows = []
    for number, attempt in enumerate(run.attempts, 1):
        begun = (
            "fresh start"
            if attempt.resume is None
            else f"iteration {attempt.base} ({tier_words(attempt.resume.get('tier'))})"
        )
        kept = min(attempt.reached, attempt.kept_until)
        rows.append(
            (
                str(number),
                attempt.name,
                human_seconds(attempt.started - run.began),
                begun,
                f"{attempt.reached:,}",
                f"{attempt.reached - max(kept, attempt.base):,.0f}",
                plural(len(attempt.spells), "node"),
                str(attempt.world_size or "-"),
            )
        )
    head = ("Attempt", "Name", "Began at", "Went on from", "Reached", "Of these lost", "On", "Ranks")
    return _details("The same as a table", _table(head, rows))


def _breaks_section(run: Run) -> str:
    if not run.interruptions and not run.faults:
        return ""
    lead = (
        "After each interruption the job takes stock of every copy it still has, on all nodes and on shared storage, "
        "and resumes from the newest save of which every part is there and verifies."
    )
    cards = [_break_card(number, interruption, run) for number, interruption in enumerate(run.interruptions, 1)]
    cards += [_fault_card(event, run) for event in run.faults]
    return _section("breaks", "What broke, and how training came back", lead, *cards)


def _break_card(number: int, broken: Interruption, run: Run) -> str:
    what = "; ".join(broken.what) or "the processes ended, and no event says why"
    heading = tag("h3", tag("span", str(number), class_="number"), escape(_sentence(what)))
    specs = "".join(tag("code", escape(spec)) + " " for spec in broken.specs)
    facts = [("Had finished", f"iteration {broken.reached:,}")]
    if broken.after is None:
        facts.append(("Came back", "no: nothing after this is known"))
        return tag(
            "article", heading, tag("p", specs), _facts(facts), class_="break", id=f"break-{number}", tabindex="-1"
        )
    resume = broken.after.resume
    if resume is None:
        facts.append(
            ("Resumed from", f"the beginning: {(broken.after.fresh or {}).get('reason') or 'no save was there'}")
        )
    else:
        facts.append(("Resumed from", f"iteration {broken.base:,}, out of {tier_words(resume.get('tier'))}"))
    facts.append(("Work lost", f"{plural(broken.lost, 'iteration')}, done again" if broken.lost else "none"))
    if resume is not None:
        facts.append(("State came from", _origin(broken)))
    if told := _foretold(broken):
        facts.append(("Foretold by “resilience explain”", told))
    parts = _restart_parts(broken)
    bar = (
        tag(
            "div",
            plots.restart_bar(parts),
            _legend([(name, f"{label}: {human_seconds(s)}") for name, label, s in parts]),
            class_="restart-parts",
        )
        if parts
        else ""
    )
    passed = [item for item in (resume or {}).get("passed_over") or [] if isinstance(item, dict)]
    return tag(
        "article", heading, tag("p", specs, class_="specs") if specs else "", _facts(facts), bar, _passed_over(passed),
        class_="break", id=f"break-{number}", tabindex="-1",
    )  # fmt: skip


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a node's name."""
    first = text.partition(" ")[0]
    return text if any(character.isdigit() for character in first) else text[:1].upper() + text[1:]


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return tag("dl", *(tag("div", tag("dt", escape(name)), tag("dd", escape(value))) for name, value in facts))


def _origin(broken: Interruption) -> str:
    """Whose copies the ranks loaded."""
    own, replica, rebuilt = (broken.total(name) for name in ("own_copies", "replica_copies", "rebuilt"))
    counted = (
        (own, "from the node’s own copies"),
        (replica, "from replicas on other nodes"),
        (rebuilt, "rebuilt from parity"),
    )
    said = [f"{count:,} {words}" for count, words in counted if count]
    fetched = broken.total("retrieved_bytes")
    text = ", ".join(said) or "shared storage"
    return f"{text}; {human_bytes(fetched)} moved over the network" if fetched else text


def _foretold(interruption: Interruption) -> str:
    """Whether `explain` had said what happened; empty where it was not asked."""
    if interruption.predicted is None:
        return ""
    return "yes, exactly this" if interruption.predicted else "no: it had said something else"


def _restart_parts(broken: Interruption) -> list[tuple[str, str, float]]:
    """(class, label, seconds) from what broke to the first new step, as far as events tell."""
    assert broken.after is not None
    gone = broken.gone if broken.gone is not None else broken.broke
    restored = broken.after.training_from
    restore = min(broken.restore_s or 0.0, max(0.0, restored - gone))
    parts = [
        ("stalled", "noticed and ended", gone - broken.broke),
        *_starting(gone, broken.after.born, restored - restore),
        ("resumed", "save found, verified and loaded", restore),
        ("train", "first step", (broken.stepped - restored) if broken.stepped is not None else 0.0),
    ]
    return [part for part in parts if part[2] > 0]


def _starting(gone: float, born: float | None, until: float) -> list[tuple[str, str, float]]:
    """From the old processes' end to the election: the launcher's part, and the new ones' if they told their age."""
    if born is None or not gone <= born <= until:
        return [("starting", "new processes start", until - gone)]
    return [
        ("starting", "the launcher makes new processes", born - gone),
        ("starting", "imports, and joining the others", until - born),
    ]


def _passed_over(passed: Sequence[Event]) -> str:
    if not passed:
        return ""
    rows = [(str(item.get("iteration")), tier_words(item.get("tier")), str(item.get("reason"))) for item in passed]
    return _details(f"Passed over: {plural(len(rows), 'newer save')}", _table(("Iteration", "Where", "Why not"), rows))


def _fault_card(event: Event, run: Run) -> str:
    failed = [save for save in run.saves if save.failed_on and save.t >= event["t"]]
    text = str(event.get("what"))
    outcome = f"Training went on; {plural(len(failed), 'save')} failed after it and can never be resumed from."
    heading = tag("h3", tag("span", "!", class_="number"), escape(_sentence(text)))
    return tag(
        "article", heading, tag("p", tag("code", escape(str(event.get("spec"))))), tag("p", outcome), class_="break"
    )


def _loss_section(run: Run) -> str:
    if len(run.metrics) < 2:
        return ""
    lead = (
        "The loss says how badly the model still predicts; it falls as the model learns. A dot marks where an "
        "attempt set in: what it did again lies on the line that was there."
    )
    rows = [(f"{iteration:,}", f"{loss:.4g}") for _, iteration, loss in run.metrics]
    table = _details("The same as a table", _table(("Iteration", "Loss"), rows))
    attempts = [(attempt.started, attempt.world_size) for attempt in run.attempts]
    curve = _figure(plots.loss_curve(run.metrics, run.undisturbed, attempts))
    keys = [("train", "this run"), ("resumed round", "an attempt sets in")]
    keys += [("undisturbed", "the run to which nothing happened")] if run.undisturbed else []
    return _section("loss", "What the model learned", lead, curve, _legend(keys), table)


def _spent_section(run: Run) -> str:
    if run.spent.wall <= 0:
        return ""
    lead = (
        "Goodput is the share of the time that went into training that counts. Starting processes takes seconds, "
        "however short the run, so that it weighs heavily in a rehearsal of a minute and little in a run of days."
    )
    rows = [
        (class_, f"{label}: {human_seconds(seconds)} ({100 * seconds / run.spent.wall:.1f} %)")
        for class_, label, seconds in plots.spent_kinds(run.spent)
    ]
    return _section("spent", "Where the time went", lead, _figure(plots.spent_bar(run.spent)), _legend(rows))


def _saves_section(run: Run) -> str:
    if not run.saves:
        return ""
    stalls = stalls_of(run.saves)
    persistent = sum(save.persistent for save in run.saves)
    failed = sum(bool(save.failed_on) for save in run.saves)
    lead = (
        f"{plural(len(run.saves), 'save')}, of which {persistent:,} persistent and {failed:,} failed. Training waits "
        "only while its state is copied in memory; writing, hashing and sending to other nodes go on beside it."
    )
    parts = [_figure(plots.stall_plot(stalls, median(stalls)))] if stalls else []
    head = ("Iteration", "Attempt", "Kind", "Training waited", "Size, all ranks", "State")
    rows = [
        (
            f"{save.iteration:,}",
            save.attempt,
            "persistent"
            if save.persistent
            else "on the nodes"
            if "global" not in save.tiers
            else "shared, non-persistent",
            human_seconds(save.stall_s),
            human_bytes(save.bytes),
            _state(save),
        )
        for save in run.saves
    ]
    return _section("saves", "Saves", lead, *parts, _details("All saves as a table", _table(head, rows)))


def _state(save: Save) -> str:
    if save.failed_on:
        node, error = save.failed_on[0]
        return f"failed on {node}: {error}"
    if not save.complete:
        return "not seen complete"
    return "complete" + (f" after {human_seconds(save.complete_after_s)}" if save.complete_after_s is not None else "")


def _proof_section(run: Run) -> str:
    if run.verdict is None or not run.verdict.get("final_digest") or not run.verdict.get("reference_digest"):
        return ""
    if run.verdict.get("why_not_bits"):
        return _section("proof", "Is the result the same?", escape(_compared(run)))
    equal = bool(run.verdict.get("bit_identical"))
    lead = (
        "The same training was also run without saves and without faults. At the end every rank computes a digest of "
        "its whole state: parameters, optimizer, random numbers, place in the data, counters. "
        + ("Both runs ended with the same bits." if equal else "The two runs ended in different states.")
    )
    rows = [("Undisturbed run", run.verdict["reference_digest"]), ("This run", run.verdict["final_digest"])]
    listed = (tag("div", tag("dt", name), tag("dd", tag("code", escape(str(value))))) for name, value in rows)
    return _section(
        "proof", "Is the result the same?", lead, tag("dl", *listed, class_=f"proof {'good' if equal else 'bad'}")
    )


def _notes_section(run: Run, skipped: int) -> str:
    notes: dict[str, int] = {}
    for event in run.warnings:
        text = str(event.get("what") or event.get("reason") or f"items differ between ranks: {event.get('keys')}")
        notes[text] = notes.get(text, 0) + 1
    if skipped:
        notes[
            f"{plural(skipped, 'line')} of the event files could not be read (a killed process may tear its last one)"
        ] = 1
    if not notes:
        return ""
    said = [escape(text + (f" ({count:,} times)" if count > 1 else "")) for text, count in notes.items()]
    overridden = [text for text in said if " was given in code, " in text]
    shown = [text for text in said if text not in overridden]
    parts = [tag("ul", *(tag("li", text) for text in shown), class_="notes")] if shown else []
    if overridden:
        listed = tag("ul", *(tag("li", text) for text in overridden), class_="notes")
        parts.append(_details(f"{plural(len(overridden), 'setting')} of the script gave way to the drill's", listed))
    return _section("notes", "Notes", "What the job itself found worth a word.", *parts)
