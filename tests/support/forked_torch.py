"""Python code in processes of their own that need not import torch again: forked from one that did nothing else."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# A line of JSON each: which code is to be run in a fork, with which sys.argv, where, with which environment, and the
# files of its output. The answer is the exit code.
SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, arguments, folder, environment, paths = json.loads(line)
    process = os.fork()
    if process:
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        continue
    status = 1
    try:
        for descriptor, path in enumerate(paths, 1):
            with open(path, "wb") as file:
                os.dup2(file.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


def run_code(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """As `python -c CODE ARGUMENTS` in the folder `cwd`, of code that begins with importing torch."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("out", "err")]
        server.stdin.write(json.dumps([code, arguments, str(cwd), dict(os.environ), list(map(str, paths))]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the process that forks others ended with {server.wait()}"
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return subprocess.CompletedProcess(["-c", code, *arguments], int(answer), out, err)


@functools.cache
def _server() -> subprocess.Popen:
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # which ends it; called before what was registered before
    return server
