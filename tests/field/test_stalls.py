"""Ranks that neither go on nor end: stopped, or waiting for a file."""
import os
import signal
import time
import unittest

from field import MPIEXEC, PROGRAM, FieldTest
from test_restarts import Process


class Stalls(FieldTest):
    TIMEOUT = 3

    # Once there is a file called "hangs", the next picture can't be opened: a file system that doesn't answer.
    SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static FILE *open_or_hang(const char *name, const char *path, const char *mode) {
  const char *end = strstr(path, ".png");
  if (end && !end[4] && rename("hangs", "hung") == 0) pause();
  return ((FILE *(*)(const char *, const char *))dlsym(RTLD_NEXT, name))(path, mode);
}
FILE *fopen(const char *path, const char *mode) { return open_or_hang("fopen", path, mode); }
FILE *fopen64(const char *path, const char *mode) { return open_or_hang("fopen64", path, mode); }
"""

    def start(self, ranks, *settings, preload=None):
        self.add_pictures()
        exports = ["-x", f"LD_PRELOAD={preload}"] if preload else []
        return Process(self, *MPIEXEC, ranks, *exports, PROGRAM, "pretrain", "--config", "tiny.yaml", "run.directory=r",
                       f"run.timeout_seconds={self.TIMEOUT}", "checkpoint.interval=0", "training.steps=1000000", *settings)

    def assertReports(self, run, *lines):
        """The job ends soon, with one report that has each of `lines` once."""
        begin = time.monotonic()
        self.assertNotEqual(run.finish(), 0, run.output)
        self.assertLess(time.monotonic() - begin, self.TIMEOUT + 10)
        self.assertEqual(run.output.count("What every rank is doing:\n"), 1, run.output)
        for line in lines:
            self.assertRegex(run.output, rf"(?m)^  {line}")

    def test_a_stopped_rank_is_named(self):
        waits = r"\(host \S+\): in \w+ number \d+ of \w+, (\d+ elements, )?for \d\S* s.*, step \d+"
        for ranks, stopped, layout in ((2, 1, ()), (2, 0, ()), (4, 2, ("parallel.tp=2", "parallel.dp=2"))):
            with self.subTest(ranks=ranks, stopped=stopped):
                run = self.start(ranks, "run.fresh=true", *layout)
                run.wait_for("step 2/")
                os.kill(run.children()[stopped], signal.SIGSTOP)
                self.assertReports(run, rf"rank {stopped}: silent \(stopped\)$",
                                   *(rf"rank {rank} {waits}" for rank in range(ranks) if rank != stopped))
                self.assertRegex(run.output, r"timed out after 3000 ms .* is silent")

    def test_a_rank_that_waits_for_a_file_is_named(self):
        run = self.start(2, "parallel.dp=2", "parallel.tp=1", preload=self.shim(self.SHIM))
        run.wait_for("step 2/")
        (self.folder / "hangs").touch()
        self.assertReports(run, r"rank \d \(host \S+\): waiting for pictures for \d.*another thread: decoding pictures for \d")


if __name__ == "__main__":
    unittest.main()
