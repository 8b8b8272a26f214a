#!/usr/bin/env python3
"""A client of bpfgate without any library: plain_client.py SOCKET APP OBJECT MAP.

Loads the object, prints the broker's reply, and element 0 of the map as hexadecimal.
"""
import ctypes, json, os, platform, socket, struct, sys

def call(sock, method, **parameters):
    """One Varlink call: JSON texts that end with a zero byte, descriptors with the first byte."""
    sock.sendall(json.dumps({"method": "io.bpfgate." + method, "parameters": parameters}).encode() + b"\0")
    text, fds = b"", []
    while not text.endswith(b"\0"):
        part, more, flags, _ = socket.recv_fds(sock, 65536, 253, socket.MSG_CMSG_CLOEXEC)
        if not part or flags & socket.MSG_CTRUNC:
            sys.exit("the connection ended, or descriptors were lost")
        text, fds = text + part, fds + more
    reply = json.loads(text[:-1])
    if "error" in reply:
        sys.exit(json.dumps(reply))
    return reply.get("parameters", {}), fds

def lookup(fd, description):
    """BPF_MAP_LOOKUP_ELEM (1) of the first key; a per-CPU map has a value for each possible CPU."""
    size = description["value_size"]
    if "percpu" in description["type"]:
        ranges = open("/sys/devices/system/cpu/possible").read().strip().split(",")
        bounds = [(r.split("-")[0], r.split("-")[-1]) for r in ranges]
        size = (size + 7) // 8 * 8 * sum(int(last) - int(first) + 1 for first, last in bounds)
    key, value = ctypes.create_string_buffer(description["key_size"]), ctypes.create_string_buffer(size)
    attr = struct.pack("=IIQQQ", fd, 0, ctypes.addressof(key), ctypes.addressof(value), 0)
    libc, number = ctypes.CDLL(None, use_errno=True), {"x86_64": 321, "aarch64": 280}[platform.machine()]
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(1), attr, ctypes.c_long(len(attr))) != 0:
        sys.exit("bpf: " + os.strerror(ctypes.get_errno()))
    return value.raw.hex()

if __name__ == "__main__":
    path, app, object_name, map_name = sys.argv[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        call(sock, "Open", app=app)
        loaded, fds = call(sock, "Load", object=object_name)
        print(json.dumps(loaded))
        wanted = next((m for m in loaded["maps"] if m["name"] == map_name), None)
        if wanted is None or wanted.get("fd") is None:
            sys.exit(f"no descriptor of a map {map_name} came with the reply")
        print(lookup(fds[wanted["fd"]], wanted))
