#!/usr/bin/env python3
"""Runs test programs one after the other inside of a machine, and says at the end what became of each test.

usage: inside.py DIRECTORY [NAME...]

DIRECTORY holds the programs (tests/machines/stage puts them there). The last line of the output is
RESULTS and a JSON object: {"kernel": release, "programs": {program: {test: [verdict, reason]}}}, with what
results.py, which is beside this file then, makes of the output.
"""

import json
import os
import subprocess
import sys

from results import Results

def run(path, results):
    """Runs one program; its output goes on as it comes."""
    process = subprocess.Popen(
        [path, "--test-threads=1", "--show-output"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        results.line(line)
    of = results.programs.setdefault(results.program, {})
    if process.wait() != 0 and not any(verdict == "failed" for verdict, _ in of.values()):
        of["(the program itself)"] = ["failed", f"exit status {process.returncode}"]


def main():
    directory, *names = sys.argv[1:]
    programs = {}
    for name in names or sorted(os.listdir(directory)):
        print(f"\n== {name}", flush=True)
        results = Results(name)
        run(os.path.join(directory, name), results)
        programs |= results.programs
    failed = any(verdict == "failed" for tests in programs.values() for verdict, _ in tests.values())
    print("RESULTS " + json.dumps({"kernel": os.uname().release, "programs": programs}), flush=True)
    return int(failed)


sys.exit(main())
