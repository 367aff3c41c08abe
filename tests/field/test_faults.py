"""What a run says, leaves and returns when numbers aren't finite, disks are full or ranks are killed."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

from field import CANNOT_WRITE, INTERRUPTED, MPIEXEC, NOT_FINITE, PROGRAM, FieldTest, Process

# Numbers that overflow in the step after the first.
DIVERGES = ("training.learning_rate=1e30", "training.warmup_steps=0", "report.pictures=0")


class Faults(FieldTest):
    def setUp(self):
        super().setUp()
        self.add_pictures()

    def start(self, ranks, *settings):
        return Process(self, *MPIEXEC, ranks, PROGRAM, "pretrain", "--config", "tiny.yaml", "report.pictures=0",
                       "run.directory=r", *settings)

    def lines(self):
        """Of the metrics: whole lines only."""
        text = (self.folder / "r/metrics.jsonl").read_text()
        self.assertTrue(text == "" or text.endswith("\n"), text[-200:])
        return [json.loads(line) for line in text.splitlines()]


class NotFinite(Faults):
    def test_data_or_model_ends_the_run_with_a_status_of_its_own(self):
        for ranks, layout in ((1, "parallel.tp=1"), (2, "parallel.dp=2"), (4, "parallel.tp=2")):
            shutil.rmtree(self.folder / "r", ignore_errors=True)
            outcome = self.pretrain("run.directory=r", layout, "parallel.sequence_parallel=true", *DIVERGES,
                                    *(["training.global_batch_size=4"] if ranks > 1 else []), ranks=ranks)
            self.assertEqual(outcome.returncode, NOT_FINITE, outcome.stdout)
            said = re.findall(r"^error: step \d+: loss .* are not all finite, the same ones when repeated: .*", outcome.stdout, re.M)
            self.assertEqual(len(said), 1, outcome.stdout)
            self.assertRegex(said[0], r"the first thing that isn't is (the output of aten::\w+, \[.*\], in or after "
                             r"[\w.]+, in the forward pass|the gradient of [\w.]+, in the backward pass) of micro-batch \d "
                             r"\(rank \d of \d\); the samples of this micro-batch: .*[abcd]\.png")

    def test_batches_are_skipped_when_asked(self):
        outcome = self.pretrain("run.directory=r", *DIVERGES, "training.not_finite=skip", "training.max_skipped_steps=3",
                                "training.steps=9", ranks=2)
        self.assertEqual(outcome.returncode, NOT_FINITE, outcome.stdout)
        self.assertIn("3 steps in a row were skipped before it", outcome.stdout)
        lines = self.lines()
        skipped = [line["skipped_steps"] for line in lines]
        self.assertEqual(skipped[-3:], [1, 2, 3])
        self.assertTrue(all(line["loss"] is None or line["grad_norm"] is None for line in lines if line["skipped_steps"]))
        # A run that ends before goes on counting when it is resumed, and has a report.
        more = [*DIVERGES, "training.not_finite=skip", f"training.steps={len(lines)}", "run.fresh=true"]
        self.assertSucceeds(self.pretrain("run.directory=r", *more, ranks=2))
        self.assertTrue((self.folder / "r/report.html").exists())
        more[-2:] = [f"training.steps={len(lines) + 1}"]
        self.assertSucceeds(self.pretrain("run.directory=r", *more, ranks=2))
        self.assertEqual([line["skipped_steps"] for line in self.lines()][-2:], [3, 4])


class CannotWrite(FieldTest):
    def test_every_command_has_a_status_for_it(self):
        self.add_pictures()
        for outcome in (self.pretrain("run.directory=tiny.yaml/r"), self.embed("tiny.yaml/o"), self.embed("/dev/full")):
            self.assertEqual(outcome.returncode, CANNOT_WRITE, outcome.stdout)


class FullDisks(Faults):
    def mount(self, size):
        """A small disk at r/."""
        (self.folder / "r").mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.folder / "r"],
                                 capture_output=True)
        if mounted.returncode != 0:
            self.skipTest("no file system can be mounted here")
        self.addCleanup(subprocess.run, ["umount", "-l", self.folder / "r"])

    def fill(self):
        with (self.folder / "r/filler").open("ab", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass

    def start(self, *settings):
        """Old checkpoints stay, so that their end makes no room."""
        return super().start(2, "checkpoint.on_error=continue", "checkpoint.interval=2", "checkpoint.keep=1000",
                             "training.steps=100000", *settings)

    def fill_until_it_says(self, run, text, times=1):
        """A save that fails gives back what it has written."""
        while run.output.count(text) < times:
            self.fill()
            run.wait_for("\n")

    def checkpoints(self):
        return sorted(p.name for p in (self.folder / "r/checkpoints").iterdir())

    def goes_on_and_writes_all_when_there_is_room(self, *settings):
        self.mount("32m")
        run = self.start(*settings)
        run.wait_for("step 3/")
        self.fill_until_it_says(run, "cannot write r/metrics.jsonl: No space left on device; training goes on")
        self.fill_until_it_says(run, "a checkpoint is left out: ", times=2)  # it tries again
        latest = os.readlink(self.folder / "r/checkpoints/latest")
        self.assertTrue((self.folder / "r/checkpoints" / latest / "manifest.json").exists(), self.checkpoints())
        self.lines()
        (self.folder / "r/filler").unlink()
        os.kill(run.popen.pid, signal.SIGUSR1)
        self.assertEqual(run.finish(), INTERRUPTED, run.output)
        last = int(re.findall(r"after step (\d+) of", run.output)[0])
        self.assertEqual([line["step"] for line in self.lines()], list(range(1, last + 1)))
        self.assertEqual(os.readlink(self.folder / "r/checkpoints/latest"), f"step-{last:08}")
        self.assertFalse([name for name in self.checkpoints() if "partial" in name], self.checkpoints())

    def test_a_run_that_may_goes_on_and_writes_all_when_there_is_room(self):
        self.goes_on_and_writes_all_when_there_is_room()

    def test_so_does_one_that_saves_while_it_waits(self):
        self.goes_on_and_writes_all_when_there_is_room("checkpoint.asynchronous=false")

    def test_a_run_without_its_last_checkpoint_ends_badly(self):
        self.mount("32m")
        run = self.start()
        run.wait_for("step 3/")
        self.fill_until_it_says(run, "a checkpoint is left out: ")
        self.fill()
        os.kill(run.popen.pid, signal.SIGUSR1)
        self.assertEqual(run.finish(), CANNOT_WRITE, run.output)
        self.assertEqual(run.output.count("error: "), 1, run.output)
        self.assertFalse([name for name in self.checkpoints() if "partial" in name], self.checkpoints())
        (self.folder / "r/filler").unlink()
        last = int(self.checkpoints()[-1].removeprefix("step-"))
        again = self.pretrain("run.directory=r", f"training.steps={last + 1}", "report.pictures=0")
        self.assertSucceeds(again)
        self.assertIn(f"resuming after step {last} ", again.stdout)

    def test_a_run_stops_at_the_first_failure_unless_told_otherwise(self):
        self.mount("400k")  # less than a checkpoint
        for setting in ("checkpoint.asynchronous=true", "checkpoint.asynchronous=false"):
            outcome = self.pretrain("run.directory=r", setting, "training.steps=1")
            self.assertEqual(outcome.returncode, CANNOT_WRITE, outcome.stdout)
            self.assertIn("No space left on device", outcome.stdout)
            self.assertEqual(self.checkpoints(), [])


class KilledRanks(Faults):
    """One of the ranks is killed with SIGKILL, and all end."""

    def assertEnded(self, run, ranks):
        begin = time.monotonic()
        self.assertGreater(run.finish(), 0, run.output)
        self.assertLess(time.monotonic() - begin, 30, run.output)  # below 10 on a machine that isn't busy
        said = " ".join(run.output.split())  # Open MPI breaks the line
        self.assertRegex(said, rf"process rank {ranks - 1} .* exited on signal 9")

    def test_while_it_starts_or_trains(self):
        for ranks in (2, 4):
            for line in ("pictures to train on", "step 2/"):
                with self.subTest(ranks=ranks, line=line):
                    run = self.start(ranks, f"training.global_batch_size={ranks}", "training.steps=100000", "run.fresh=true")
                    run.wait_for(line)
                    os.kill(run.children()[-1], signal.SIGKILL)
                    self.assertEnded(run, ranks)

    def test_while_it_saves(self):
        for ranks in (2, 4):
            for point in ("copied", "half_written", "file_renamed"):
                with self.subTest(ranks=ranks, point=point):
                    words = [PROGRAM, "pretrain", "--config", "tiny.yaml", "run.directory=r", "run.fresh=true",
                             f"training.global_batch_size={ranks}", "training.steps=100000"]
                    run = Process(self, *MPIEXEC, ranks - 1, *words, ":", MPIEXEC[-1], 1, "-x",
                                  f"MCPP_KILL_AT_SAVE_POINT={point}", *words)
                    run.wait_for("step 1/")
                    self.assertEnded(run, ranks)


if __name__ == "__main__":
    unittest.main()
