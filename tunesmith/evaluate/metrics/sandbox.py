"""Runs code that a model wrote: in a process of its own, in an empty folder, without network, with limits.

On Linux a seccomp filter refuses sockets, tracing and new programs to the kernel's face; elsewhere Python's audit hooks
do. It keeps accidents in; it is not a prison for code that was written to break out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

# Runs inside the new process, before the code. argv: CPU seconds, bytes of memory.
GUARD = r"""
import ctypes, platform, resource, struct, sys
cpu, memory = int(sys.argv[1]), int(sys.argv[2])
def limit(what, value):
    resource.setrlimit(what, (value, value))
limit(resource.RLIMIT_CPU, cpu)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, 2**20)
limit(resource.RLIMIT_NOFILE, 32)
limit(resource.RLIMIT_CORE, 0)
def deny():
    # These fail with EPERM: socket, socketpair, connect, bind, fork, vfork, execve, execveat, ptrace, kill.
    machines = {
        "x86_64": (0xC000003E, (41, 53, 42, 49, 57, 58, 59, 322, 101, 62)),
        "aarch64": (0xC00000B7, (198, 199, 203, 200, 221, 281, 117, 129)),
    }
    if sys.platform != "linux" or platform.machine() not in machines:
        return False
    arch, calls = machines[platform.machine()]
    op = lambda code, yes, no, k: struct.pack("HBBI", code, yes, no, k)
    program = op(0x20, 0, 0, 4) + op(0x15, 1, 0, arch) + op(0x06, 0, 0, 0x80000000) + op(0x20, 0, 0, 0)
    for place, number in enumerate(calls):
        program += op(0x15, len(calls) - place, 0, number)
    program += op(0x06, 0, 0, 0x7FFF0000) + op(0x06, 0, 0, 0x00050001)
    buffer = ctypes.create_string_buffer(program, len(program))
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("at", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    given = Filter(len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(given), 0, 0) == 0
shut = deny()
REFUSED = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
CHANGES = ("remove", "rename", "rmdir", "mkdir", "chmod", "chown", "symlink", "link", "truncate")
CHANGES = {"os." + name for name in CHANGES}
import os
HERE, WRITING = os.getcwd() + os.sep, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def outside(path, os=os, here=HERE):
    return not isinstance(path, int) and not os.path.realpath(os.fsdecode(path)).startswith(here)
def hook(event, arguments):
    if event.startswith(REFUSED):
        raise PermissionError(event + " is not allowed here")
    if event in CHANGES or (event == "open" and arguments[2] & WRITING):
        if any(outside(x) for x in arguments[: 2 if event == "os.rename" else 1]):
            raise PermissionError(event + " outside of its folder is not allowed here")
source = sys.stdin.read()
sys.stdin = None
sys.argv = ["answer.py"]
sys.addaudithook(hook)
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `passed`, or why not (its last line of error, or the limit it met)."""

    passed: bool
    why: str


def run(code: str, seconds: float = 10.0, memory: int = 2**29) -> Outcome:
    """Run a Python program; it passes if it ends without an error.

    Args:
        seconds: of processor time; half as much again of the clock's.
        memory: bytes of address space.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD, str(max(1, round(seconds))), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "", "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            _, error = process.communicate(code.encode("utf-8", "replace"), timeout=1.5 * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome(False, f"took longer than {1.5 * seconds:g} s")
    if process.returncode == 0:
        return Outcome(True, "")
    if process.returncode < 0:
        return Outcome(False, f"was stopped by {signal.Signals(-process.returncode).name}")
    return Outcome(False, (error.decode("utf-8", "replace").strip().splitlines() or ["failed"])[-1][:200])
