"""The figures of one run on a GPU: written after every step, so that a run that is killed leaves what it had."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON, TABLE = "figures.json", "table.txt"
ALONE, RESTORED = "alone, warm caches", "restored"


class NotHere(Exception):
    """A step that cannot run on this machine or with this engine, with the reason."""


@dataclass
class Figures:
    """What has been measured so far: facts by name, and series of seconds by the row of the table."""

    folder: Path
    budget_s: float
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    """The rows by their answer: more than one answer is a fault."""

    @property
    def left_s(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.budget_s - (time.monotonic() - self.began)

    def add(self, row: str, seconds: float, answer: str | None = None, phases: dict[str, float] | None = None) -> None:
        """Add one timing to a row and write everything down."""
        self.rows.setdefault(row, []).append(round(seconds, 4))
        if answer is not None and row not in self.answers.setdefault(answer, []):
            self.answers[answer].append(row)
        for phase, took in (phases or {}).items():
            self.phases.setdefault(row, {}).setdefault(phase, []).append(round(took, 4))
        print(f"gpu: {row}: {seconds:.2f} s", flush=True)
        self.save()

    def know(self, **facts: Any) -> None:
        """Add facts and write everything down."""
        self.facts |= facts
        print(f"gpu: {json.dumps(facts)}", flush=True)
        self.save()

    def attempt(self, name: str, do: Callable[[], None], estimate_s: float = 0.0) -> None:
        """Run a step if the time that is left suffices, and write down how it ended. A step's failure ends only that step.

        Raises SystemExit, which a stopping signal raises in the step, after that is written down.
        """
        if self.left_s < estimate_s:
            self._end(name, f"not begun: {self.left_s:.0f} s left, about {estimate_s:.0f} s needed")
            return
        began = time.monotonic()
        self.steps[name] = "begun, not ended"
        self.save()
        try:
            do()
        except NotHere as why:
            self._end(name, f"not here: {why}")
        except (Exception, SystemExit) as error:
            self._end(name, f"failed after {time.monotonic() - began:.1f} s: {type(error).__name__}: {error}")
            if isinstance(error, SystemExit):
                raise
        else:
            self._end(name, f"done in {time.monotonic() - began:.1f} s")

    def _end(self, name: str, how: str) -> None:
        self.steps[name] = how
        print(f"gpu: step {name}: {how}", flush=True)
        self.save()

    @property
    def failed(self) -> bool:
        """Return True if a step failed or an answer differs."""
        return len(self.answers) > 1 or any(how.startswith("failed") for how in self.steps.values())

    def save(self) -> None:
        """Write both files, each under another name first: a kill at any moment leaves whole ones."""
        about = {name: getattr(self, name) for name in ("facts", "rows", "phases", "steps", "answers")}
        for name, text in ((JSON, json.dumps(about, indent=1)), (TABLE, self.table())):
            new = self.folder / f".{name}"
            new.write_text(text)
            os.replace(new, self.folder / name)

    def table(self) -> str:
        """Return the table so far: a row for each way of starting with its phases, the facts, and how each step ended."""
        lines = [f"{'to the first token':44} {'median':>9}   spread"]
        for row, seconds in self.rows.items():
            median = statistics.median(seconds)
            lines.append(f"{row:44} {median:7.2f} s   {min(seconds):.2f} - {max(seconds):.2f} s, {len(seconds)} runs")
            if self.phases.get(row):
                parts = [f"{name} {statistics.median(took):.2f}" for name, took in self.phases[row].items()]
                lines.append(f"    {', '.join(parts)}")
        if ALONE in self.rows and RESTORED in self.rows:
            ratio = statistics.median(self.rows[ALONE]) / statistics.median(self.rows[RESTORED])
            lines.append(f"restored is {ratio:.1f} times faster than alone")
        if self.answers:
            lines.append("all answers equal" if len(self.answers) == 1 else f"DIFFERENT answers: {self.answers}")
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        lines += [f"step {name}: {how}" for name, how in self.steps.items()]
        return "\n".join(lines) + "\n"
