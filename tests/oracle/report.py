"""Counting checks and printing tables."""

import sys
import time


class Report:
    def __init__(self):
        self.passed, self.failures, self.skips, self.start = 0, [], [], time.time()

    def check(self, name, ok, detail=""):
        if ok:
            self.passed += 1
        else:
            self.fail(name, detail)
        return ok

    def fail(self, name, detail=""):
        self.failures.append((name, detail))
        self.say(f"FAIL {name}: {detail}" if detail else f"FAIL {name}")

    def skip(self, name, why):
        self.skips.append((name, why))
        self.say(f"skip {name}: {why}")

    def say(self, text):
        print(f"[{time.time() - self.start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def last_line(self):
        return f"{self.passed} passed, {len(self.failures)} failed, {len(self.skips)} skipped"


def number(x):
    return "-" if x is None else x if isinstance(x, str) else "0" if x == 0 else f"{x:.1e}" if abs(x) < 1e-2 else f"{x:.2f}"


def table(title, columns, rows):
    """Columns: (heading, key or function of the row, '<' or '>')."""
    cells = [[h for h, _, _ in columns]]
    for row in rows:
        cells.append([str(k(row) if callable(k) else "-" if row[k] is None else row[k]) for _, k, _ in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [title, ""]
    for at, line in enumerate(cells):
        lines.append("  ".join(f"{c:{columns[i][2]}{widths[i]}}" for i, c in enumerate(line)).rstrip())
        if at == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines) + "\n"
