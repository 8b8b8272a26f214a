"""What the two runners (nspawn, vm) share: the job given to the machine, and what comes back."""

import argparse
import ctypes
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = os.path.realpath(os.environ.get("CARGO_TARGET_DIR") or f"{HERE}/../../target") + "/machines"
# What became of the tests in each machine, as JSON.
RESULTS = f"{TARGET}/results"

# Exit statuses of the runners when the command's own is not known.
USAGE = 2
NO_RESULT = 121
TIMEOUT = 124

# The directory of the job, as the machine sees it.
GUEST = "/run/machine"

IMAGES = ["bookworm", "trixie", "bookworm-installed", "trixie-installed"]
IMAGES_HELP = "bookworm or trixie; with -installed behind it, the package is in it"

# A service of its own behind multi-user.target, so that the start of the machine does not wait for
# it: jobs of systemctl run as usual, and is-system-running says what it would say. Type=exec,
# because a oneshot would stay "activating". ExecStopPost reports even a killed command.
#
# The output is a FIFO, because a command may open /dev/stderr again: that would truncate a file,
# and a port of the virtual machine can only be open once.
UNIT = f"""\
[Unit]
Description=The command of this machine
After=multi-user.target
IgnoreOnIsolate=yes
{{dependencies}}

[Service]
Type=exec
ExecStart=/bin/bash {GUEST}/command
ExecStopPost=/bin/bash {GUEST}/report
Environment=HOME=/root LANG=C.UTF-8
WorkingDirectory=/root
StandardInput=null
StandardOutput=file:{GUEST}/output
StandardError=inherit
OOMPolicy=continue
TasksMax=infinity
TimeoutStopSec=10
"""

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """A signal asked this runner to end."""

    def __init__(self, number):
        super().__init__(number)
        self.status = 128 + number


def say(text):
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)


def fail(text, status=USAGE):
    say(text)
    sys.exit(status)


def stop_on_signals():
    """SIGHUP, SIGINT and SIGTERM become the exception Stopped, so that `finally` cleans up."""

    def stop(number, _frame):
        # Once is enough: a second Ctrl-C must not interrupt the cleaning up.
        for s in SIGNALS:
            signal.signal(s, signal.SIG_IGN)
        raise Stopped(number)

    for s in SIGNALS:
        signal.signal(s, stop)


def end_with_parent(number):
    """For preexec_fn: this process gets the signal when the runner itself is killed."""
    for s in SIGNALS:
        signal.signal(s, signal.SIG_DFL)
    # A session of its own: Ctrl-C reaches the runner only, which then ends the machine in order.
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def build(*command):
    """What one of the scripts prints that make images and kernels. They say themselves why they fail."""
    process = subprocess.Popen([f"{HERE}/{command[0]}", *command[1:]], stdout=subprocess.PIPE, text=True)
    try:
        answer, _ = process.communicate()
    except Stopped:
        # Only the script itself can clean up what it has half made.
        process.terminate()
        process.wait()
        raise
    if process.returncode != 0:
        fail(f"'{' '.join(command)}' failed", NO_RESULT)
    return answer.strip()


def build_image(name, *options):
    """Makes an image of IMAGES, if it is missing or outdated."""
    suite, _, installed = name.partition("-")
    build("installed" if installed else "image", suite, *options)


def mapping(text):
    """HOST:GUEST"""
    host, colon, guest = text.rpartition(":")
    if not colon or not host or not guest.startswith("/"):
        raise argparse.ArgumentTypeError(f"'{text}' is not HOST:/GUEST")
    host = os.path.abspath(host)
    if not os.path.exists(host):
        raise argparse.ArgumentTypeError(f"{host} does not exist")
    if re.search(r"[:\\\s]", host + guest):
        raise argparse.ArgumentTypeError(f"'{text}': a path with a space, backslash or colon cannot be mounted")
    return host, guest


def variable(text):
    """NAME=VALUE"""
    name, equals, _value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return text


def repeated(parser, option, kind, meaning):
    parser.add_argument(option, metavar=kind.__doc__, type=kind, action="append", default=[], help=meaning)


def parse(parser, timeout):
    """The arguments; those behind the first "--" are the command, whatever they look like."""
    repeated(parser, "--setenv", variable, "an environment variable of the command")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=timeout, help=f"seconds until the machine is ended ({timeout})"
    )
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:split])
    args.command = words[split + 1 :]
    if not args.command:
        parser.error("there is no command; it stands behind --")
    return args


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


class Job:
    """The command, and the unit that runs it, as files of a directory; and its output and result.

    Both come in one stream, so that the result is behind the output. A mark that nobody can guess
    tells them apart: \\0 MARK " start" when the command starts, \\0 MARK " exited 3" at its end.
    """

    def __init__(self, directory, args, at_end="", dependencies="", units=()):
        self.mark = b"\0" + secrets.token_hex(16).encode()
        self.pending = b""
        self.fd = None
        self.started = False
        self.status = None

        mark = self.mark[1:].decode()
        exports = "".join(f"export {shlex.quote(v)}\n" for v in args.setenv)
        write(f"{directory}/command", f"printf '\\0%s start\\n' {mark}\n{exports}exec {shlex.join(args.command)}\n")
        write(f"{directory}/report", f"printf '\\0%s %s %s\\n' {mark} \"$EXIT_CODE\" \"$EXIT_STATUS\"\n{at_end}\n")
        os.makedirs(f"{directory}/units/multi-user.target.wants")
        write(f"{directory}/units/job.service", UNIT.format(dependencies=dependencies))
        os.symlink("../job.service", f"{directory}/units/multi-user.target.wants/job.service")
        for name, text in units:
            write(f"{directory}/units/{name}", text)

    def listen(self, fifo):
        os.mkfifo(fifo)
        os.chmod(fifo, 0o666)  # for a program without privilege that opens /dev/stderr
        # For writing too, so that the stream does not end when a writer does.
        self.fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def pump(self, seconds):
        """Copies what has come to stdout; waits a little for it."""
        while select.select([self.fd], [], [], seconds)[0]:
            seconds = 0
            self.pending += os.read(self.fd, 1 << 16)
            while self.next_part():
                pass

    def next_part(self):
        before, mark, after = self.pending.partition(self.mark)
        if not mark:
            # What could be the beginning of a mark waits for the rest.
            begin = self.pending.rfind(b"\0")
            if begin < 0 or not self.mark.startswith(self.pending[begin:]):
                begin = len(self.pending)
            self.show(self.pending[:begin])
            self.pending = self.pending[begin:]
            return False
        self.show(before)
        line, newline, rest = after.partition(b"\n")
        if not newline:
            self.pending = mark + after
            return False
        self.pending = rest
        word, _, status = line.decode(errors="replace").strip().partition(" ")
        if word == "start":
            self.started = True
        elif word == "exited" and status.isdigit():
            self.status = int(status)
        else:  # killed or dumped; said as a shell would
            self.status = 128 + getattr(signal, f"SIG{status}", 0)
        return True

    def show(self, data):
        # What comes after the result is from processes that outlived the command.
        while data and self.status is None:
            data = data[os.write(1, data) :]


def tail(path, size=3000):
    try:
        with open(path, "rb") as f:
            return f.read()[-size:].decode(errors="replace")
    except FileNotFoundError:
        return ""
