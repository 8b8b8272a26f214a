"""What the two runners (nspawn, vm) share: the job given to the machine, and what comes back."""

import argparse
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = os.path.join(
    os.environ.get("CARGO_TARGET_DIR", os.path.join(HERE, "..", "..", "target")), "machines"
)

# Exit statuses of the runners when the command's own is not known.
USAGE = 2
NO_RESULT = 121
TIMEOUT = 124

PR_SET_PDEATHSIG = 1

IMAGES = ["bookworm", "trixie", "bookworm-installed", "trixie-installed"]
IMAGES_HELP = "bookworm or trixie; with -installed behind it, the package is in it"

# The job is a service of its own behind multi-user.target, so that the start of the machine does
# not wait for it: jobs of systemctl run as usual, and is-system-running says what it would say.
# Type=exec, because a oneshot would stay "activating". ExecStopPost reports even a killed command.
UNIT = """\
[Unit]
Description=The command of this machine
After=multi-user.target
IgnoreOnIsolate=yes

[Service]
Type=exec
ExecStart=/bin/bash {guest}/command
ExecStopPost=-/bin/sh {guest}/report
Environment=HOME=/root LANG=C.UTF-8
WorkingDirectory=/root
StandardInput=null
StandardOutput={output}
StandardError={output}
OOMPolicy=continue
TasksMax=infinity
SendSIGHUP=no
TimeoutStopSec=10
"""


class Stopped(Exception):
    """A signal asked this runner to end."""

    def __init__(self, number):
        super().__init__(number)
        self.status = 128 + number


def fail(text, status=USAGE):
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
    sys.exit(status)


def stop_on_signals():
    """SIGINT, SIGTERM and SIGHUP become the exception Stopped, so that `finally` cleans up."""

    def stop(number, _frame):
        # Once is enough: a second Ctrl-C must not interrupt the cleaning up.
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
        raise Stopped(number)

    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, stop)


def end_with_parent(number):
    """For preexec_fn: this process gets the signal when the runner itself is killed."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_DFL)
    # A session of its own: Ctrl-C reaches the runner only, which then ends the machine in order.
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def build(*command):
    """Runs one of the scripts that make images and kernels; they explain themselves if they fail."""
    process = subprocess.Popen([f"{HERE}/{command[0]}", *command[1:]])
    try:
        status = process.wait()
    except Stopped:
        # Only the script itself can clean up what it has half made.
        process.terminate()
        process.wait()
        raise
    if status != 0:
        fail(f"'{' '.join(command)}' failed", NO_RESULT)


def build_image(name, *options):
    """Makes an image of IMAGES, if it is missing or outdated."""
    suite, _, installed = name.partition("-")
    build("installed" if installed else "image", suite, *options)


def mapping(text):
    """HOST:GUEST, both made sure to be usable as paths of mounts."""
    host, colon, guest = text.rpartition(":")
    if not colon or not host or not guest.startswith("/"):
        raise argparse.ArgumentTypeError(f"'{text}' is not HOST:/GUEST")
    host = os.path.abspath(host)
    if not os.path.exists(host):
        raise argparse.ArgumentTypeError(f"{host} does not exist")
    if re.search(r"[:\\\s]", host + guest):
        raise argparse.ArgumentTypeError(f"'{text}' has a character that paths of mounts must not have here")
    return host, guest


def variable(text):
    """NAME=VALUE"""
    name, equals, _value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return text


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def write_job(directory, guest, command, setenv, output, report):
    """Fills `directory`, which the machine sees as `guest`: the command, the report, the unit.

    `report` is the shell code that hands over $result ("exited 3", "killed KILL") and powers off.
    """
    exports = "".join(f"export {shlex.quote(v)}\n" for v in setenv)
    write(f"{directory}/command", f"{exports}exec {shlex.join(command)}\n")
    write(f"{directory}/report", f'result="$EXIT_CODE $EXIT_STATUS"\n{report}\n')
    os.makedirs(f"{directory}/units/multi-user.target.wants")
    write(f"{directory}/units/job.service", UNIT.format(guest=guest, output=output))
    os.symlink("../job.service", f"{directory}/units/multi-user.target.wants/job.service")


def status_of(result):
    """The exit status for what `report` handed over, as a shell would say it; None if it is no result."""
    code, _, status = result.strip().partition(" ")
    if code == "exited" and status.isdigit():
        return int(status)
    if code in ("killed", "dumped") and hasattr(signal, f"SIG{status}"):
        return 128 + getattr(signal, f"SIG{status}")
    return None


class Output:
    """Copies a growing file to stdout."""

    def __init__(self, path):
        self.file = open(path, "rb")

    def pump(self):
        while data := self.file.read(1 << 16):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def tail(path, size=3000):
    try:
        with open(path, "rb") as f:
            return f.read()[-size:].decode(errors="replace")
    except FileNotFoundError:
        return ""
