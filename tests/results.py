#!/usr/bin/env python3
"""What became of each test, from what libtest prints with --show-output.

usage: results.py LOG

Prints the tests of a log of cargo that were skipped, and why.
"""

import re
import sys

PROGRAM = re.compile(r"^\s+Running (?:unittests )?\S+ \(\S*/(\S+)-[0-9a-f]+\)$")
STARTED = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. ")
VERDICT = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED)$")
IGNORED = re.compile(r"^test (\S+) \.\.\. ignored")
SECTION = re.compile(r"^---- (\S+) stdout ----$")
SKIPPED = "skipped: "


class Results:
    """{program: {test: [verdict, reason]}}; a verdict is ok, failed or skipped."""

    def __init__(self, program=None):
        self.programs = {}
        self.section = self.started = None
        self.program = program

    def line(self, line):
        """Takes the next line of the output."""
        line = line.rstrip("\n")
        if match := PROGRAM.match(line):
            self.program, self.section, self.started = match[1], None, None
        if self.program is None:
            return
        of = self.programs.setdefault(self.program, {})
        if IGNORED.match(line):
            # Not a test, but what a test starts.
            return
        if match := STARTED.match(line):
            self.started = match[1]
            # What a test prints outside of libtest's capture stands between its name and its verdict.
            of.setdefault(self.started, ["failed", "it did not come to its end"])
        if match := VERDICT.match(line):
            of[match[1]] = [{"ok": "ok", "FAILED": "failed"}[match[2]], ""]
        elif self.started and line.endswith("ok") and of[self.started][1].startswith("it did not"):
            of[self.started] = ["ok", ""]
        if match := SECTION.match(line):
            self.section = match[1]
        elif self.section in of and line.startswith(SKIPPED):
            reason = line.removeprefix(SKIPPED)
            before = of[self.section][1]
            of[self.section] = ["skipped", f"{before}; {reason}" if before else reason]


def read(log):
    """The results of a log of cargo test."""
    results = Results()
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            results.line(line)
    return results.programs


def main():
    programs = read(sys.argv[1])
    skipped = [
        f"  {program}::{test}: {reason}"
        for program, tests in programs.items()
        for test, (verdict, reason) in tests.items()
        if verdict == "skipped"
    ]
    if skipped:
        print("\nmake test: passed, but not all of it was run here:\n" + "\n".join(skipped))
    else:
        print("\nmake test: passed, nothing was skipped")


if __name__ == "__main__":
    sys.exit(main())
