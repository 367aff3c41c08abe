#!/usr/bin/env python3
"""Starts a program on several ranks as torchrun does, by environment variables: start_ranks.py RANKS PROGRAM [ARGUMENT ...]

When a rank fails, the others are killed, and its exit status is returned.
"""
import os
import socket
import subprocess
import sys

ranks, command = int(sys.argv[1]), sys.argv[2:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
running = {}
for rank in range(ranks):
    process = subprocess.Popen(command, env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    running[process.pid] = process
status = 0
while running and status == 0:
    pid, status = os.wait()
    del running[pid]
for process in running.values():
    process.kill()
sys.exit(min(255, abs(os.waitstatus_to_exitcode(status))))
