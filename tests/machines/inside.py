#!/usr/bin/env python3
"""Runs test programs one after the other inside of a machine, and says at the end what became of each test.

usage: inside.py DIRECTORY [NAME...]

DIRECTORY holds the programs (tests/machines/stage puts them there). The last line of the output is
RESULTS and a JSON object: {program: {test: [verdict, reason]}}; verdict is ok, failed or skipped.
"""

import json
import os
import re
import subprocess
import sys

VERDICT = re.compile(r"^test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored.*)$")
SECTION = re.compile(r"^---- (\S+) stdout ----$")


def run(path, results):
    """Runs one program; its output goes on as it comes."""
    process = subprocess.Popen(
        [path, "--test-threads=1", "--show-output"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    section = started = None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        line = line.rstrip("\n")
        if match := re.match(r"^test (\S+) \.\.\. ", line):
            started = match[1]
            # What a test prints outside of libtest's capture stands between its name and its verdict.
            results.setdefault(started, ["failed", "it did not come to its end"])
        if match := VERDICT.match(line):
            verdict = {"ok": "ok", "FAILED": "failed"}.get(match[2], "skipped")
            results[match[1]] = [verdict, match[2].removeprefix("ignored, ") if verdict == "skipped" else ""]
        elif started and line.endswith("ok") and results[started][1].startswith("it did not"):
            results[started] = ["ok", ""]
        if match := SECTION.match(line):
            section = match[1]
        elif section and line.startswith("skipped: "):
            results[section] = ["skipped", line.removeprefix("skipped: ")]
    if process.wait() != 0 and not any(verdict == "failed" for verdict, _ in results.values()):
        results["(the program itself)"] = ["failed", f"exit status {process.returncode}"]


def main():
    directory, *names = sys.argv[1:]
    all_results = {}
    for name in names or sorted(os.listdir(directory)):
        print(f"\n== {name}", flush=True)
        run(os.path.join(directory, name), all_results.setdefault(name, {}))
    failed = any(verdict == "failed" for tests in all_results.values() for verdict, _ in tests.values())
    print("RESULTS " + json.dumps(all_results), flush=True)
    return int(failed)


sys.exit(main())
