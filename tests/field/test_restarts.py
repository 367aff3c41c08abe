"""Restarts: signals that ask a run to stop, Slurm, and settings that a run can't go on with."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import unittest

from field import (CANNOT_WRITE, CASES, INTERRUPTED, MPIEXEC, NOT_FINITE, PROGRAM, ROOT, SUSPECTED_HOST, FieldTest,
                   Process, curve, tensors)


def open_mpi_version():
    """Of the launcher; 0 if it is another MPI's."""
    said = subprocess.run([MPIEXEC[0], "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Open MPI\) (\d+)", said)
    return int(found[1]) if found else 0


class Signals(FieldTest):
    STEPS = 40

    def setUp(self):
        super().setUp()
        self.add_pictures()

    def start(self, ranks, *settings):
        launcher = [*MPIEXEC, ranks] if ranks > 1 else []
        return Process(self, *launcher, PROGRAM, "pretrain", "--config", "tiny.yaml", "checkpoint.interval=0",
                       "report.pictures=0", f"training.steps={self.STEPS}", *settings)

    def assertInterrupted(self, run, status, output, number):
        """It stopped after a step that is in the metrics and in a checkpoint, and says so once."""
        self.assertEqual(status, number, output)
        said = re.findall(r"^stopped by SIG\w+ after step (\d+) of \d+, which is saved", output, re.M)
        self.assertEqual(len(said), 1, output)
        step = int(said[0])
        self.assertEqual([line["step"] for line in curve(self.folder / run)], list(range(1, step + 1)))
        self.assertEqual(os.readlink(self.folder / run / "checkpoints/latest"), f"step-{step:08}")
        self.assertRegex((self.folder / run / "report.html").read_text(), '"total_steps":[1-9]')
        return step

    def assertGoesOnAsIfNothingHadBeen(self, ranks, *settings):
        again = self.start(ranks, "run.directory=r", *settings)
        self.assertEqual(again.finish(), 0, again.output)
        self.assertIn("resuming after step ", again.output)
        whole = self.start(ranks, "run.directory=whole", *settings)
        self.assertEqual(whole.finish(), 0, whole.output)
        self.assertEqual(curve(self.folder / "r"), curve(self.folder / "whole"))
        self.assertIn('"total_steps":0', (self.folder / "r/report.html").read_text())
        last = f"checkpoints/step-{self.STEPS:08}"
        expected = tensors(self.folder / "whole" / last)
        self.assertTrue(expected)
        self.assertTrue(tensors(self.folder / "r" / last) == expected)

    def test_one_process_finishes_the_step_and_saves(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            run = self.start(1, "run.directory=r", "run.fresh=true")
            run.wait_for("step 1/")
            run.popen.send_signal(number)
            self.assertInterrupted("r", run.finish(), run.output, INTERRUPTED)
            self.assertIn(f"stopped by {number.name} after", run.output)
        self.assertGoesOnAsIfNothingHadBeen(1)

    def test_mpirun_passes_the_third_signal_on(self):
        run = self.start(2, "run.directory=r")
        run.wait_for("step 1/")
        run.popen.send_signal(signal.SIGUSR1)
        self.assertInterrupted("r", run.finish(), run.output, INTERRUPTED)
        self.assertGoesOnAsIfNothingHadBeen(2)

    def test_a_signal_to_one_rank_stops_all_after_the_same_step(self):
        layout = ("parallel.tp=2", "parallel.dp=2")
        run = self.start(4, "run.directory=r", *layout)
        run.wait_for("step 2/")
        os.kill(run.children()[-1], signal.SIGTERM)
        self.assertInterrupted("r", run.finish(), run.output, INTERRUPTED)
        self.assertGoesOnAsIfNothingHadBeen(4, *layout)

    @unittest.skipIf(open_mpi_version() >= 5, "its mpirun kills the ranks a fifth of a second later")
    def test_mpirun_that_is_ended_gives_the_ranks_a_second(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            run = self.start(2, "run.directory=r", "run.fresh=true", "training.steps=100000")
            run.wait_for("step 1/")
            run.popen.send_signal(number)
            self.assertInterrupted("r", run.finish(), run.output, 1)

    def test_a_second_signal_ends_at_once(self):
        run = self.start(2, "run.directory=r", "run.timeout_seconds=600")
        run.wait_for("step 1/")
        first, second = run.children()
        os.kill(second, signal.SIGSTOP)  # so that the first can't finish its step
        while run.popen.poll() is None:
            try:
                os.kill(first, signal.SIGTERM)
                run.popen.wait(timeout=0.2)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                pass
        self.assertNotEqual(run.finish(), 0)
        self.assertRegex(run.output, r"exited\s+on\s+signal 15 \(Terminated\)")
        self.assertNotIn("stopped by", run.output)

    def test_before_the_first_step_there_is_nothing_to_save(self):
        os.remove(self.folder / "p/a.txt")
        os.mkfifo(self.folder / "tiny.fifo")
        run = Process(self, PROGRAM, "pretrain", "--config", "tiny.fifo")  # waits for its configuration
        run.popen.send_signal(signal.SIGTERM)
        self.assertEqual(run.finish(), -signal.SIGTERM)


class Settings(FieldTest):
    def test_what_a_run_cannot_go_on_with_is_named(self):
        self.add_pictures()
        self.assertSucceeds(self.step37("pretrain", "--config", "tiny.yaml", "run.directory=r", "training.steps=1"))
        changed = ["model.hidden_size=64", "model.rope_theta=10", "vision.freeze=true", "data.vocabulary_size=400",
                   "training.seed=7"]
        before = sorted((p, p.stat().st_mtime_ns) for p in (self.folder / "r").rglob("*"))
        outcome = self.pretrain("run.directory=r", "training.steps=2", *changed)
        self.assertFails(outcome, "model.hidden_size 64 (was 32)", "model.rope_theta 10 (was 5e+06)",
                         "vision.freeze true (was false)", "data.vocabulary_size 400 (was 300)",
                         "training.seed 7 (was 1")
        self.assertEqual(sorted((p, p.stat().st_mtime_ns) for p in (self.folder / "r").rglob("*")), before)
        outcome = self.pretrain("run.directory=r", "training.steps=2", "training.learning_rate=1e-2", "data.crops=true",
                                "training.global_batch_size=4", "parallel.dp=2", "parallel.tp=1", "run.fresh=False")
        self.assertSucceeds(outcome)
        self.assertIn("resuming after step 1", outcome.stdout)


class Layouts(FieldTest):
    EXPERTS = ["model.num_moe_experts=4", "model.moe_first_layer=1", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=16",
               "model.moe_shared_expert_intermediate_size=32", "model.freeze_router=false", "training.global_batch_size=4",
               "training.learning_rate=1e-2", "training.eps=1e-4", "checkpoint.interval=2", "report.pictures=0"]
    ZERO1 = "training.distributed_optimizer=true"
    BFLOAT16 = "training.precision=bfloat16"

    def train(self, run, tp, dp, *settings):
        """Of all four steps the losses."""
        outcome = self.pretrain(f"run.directory={run}", f"parallel.tp={tp}", f"parallel.dp={dp}", *self.EXPERTS, *settings,
                                "training.steps=4", ranks=tp * dp)
        self.assertSucceeds(outcome)
        return [json.loads(line)["loss"] for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def test_other_ranks_and_settings_go_on_with_the_same_losses(self):
        self.add_pictures()
        losses = self.train("saved", 2, 1)
        self.assertLess(losses[3], losses[1] - 0.05)
        narrow = self.train("saved16", 2, 1, self.BFLOAT16, self.ZERO1, "parallel.ep=2")
        for of in ("saved", "saved16"):
            shutil.rmtree(self.folder / of / "checkpoints/step-00000004")
            (self.folder / of / "checkpoints/latest").unlink()
            (self.folder / of / "checkpoints/latest").symlink_to("step-00000002")
        for number, (of, tp, dp, settings) in enumerate((
                ("saved", 1, 2, ["parallel.ep=2", self.ZERO1]),
                ("saved", 1, 1, []),
                ("saved", 1, 1, [self.BFLOAT16, self.ZERO1]),
                ("saved", 2, 2, ["parallel.ep=4", self.ZERO1]),
                ("saved", 2, 2, ["parallel.ep=2", "parallel.etp=2", self.ZERO1, self.BFLOAT16]),
                ("saved16", 1, 2, []))):
            with self.subTest(of=of, tp=tp, dp=dp, settings=settings):
                shutil.copytree(self.folder / of, self.folder / f"run{number}", symlinks=True)
                went_on = self.train(f"run{number}", tp, dp, *settings)
                # bfloat16 has 8 bits.
                changes_precision = of == "saved16" or self.BFLOAT16 in settings
                for actual, expected in zip(went_on, losses if of == "saved" else narrow, strict=True):
                    self.assertAlmostEqual(actual, expected, delta=0.02 if changes_precision else 1e-4 * expected)


class FormatVersion1(FieldTest):
    """tests/cases/checkpoint_v1: a run of the program that wrote checkpoints of format version 1."""

    def setUp(self):
        super().setUp()
        shutil.rmtree(self.folder)
        shutil.copytree(CASES / "checkpoint_v1", self.folder)

    def test_the_run_goes_on_as_it_would_have(self):
        for ranks in (1, 2):
            shutil.rmtree(self.folder / "run")
            shutil.copytree(CASES / "checkpoint_v1/run", self.folder / "run")
            self.assertSucceeds(self.pretrain(f"parallel.tensor={ranks}", "training.steps=4", ranks=ranks))
            lines = (self.folder / "run/metrics.jsonl").read_text().splitlines()
            # The passes of that version had other orders: the four samples of a step are added up in another one.
        for line, loss in zip(lines[2:], [5.482266664505005, 5.454863548278809], strict=True):
            self.assertAlmostEqual(json.loads(line)["loss"], loss, delta=1e-6)
            for step, version in ((2, 1), (4, 3)):
                manifest = json.loads((self.folder / f"run/checkpoints/step-{step:08}/manifest.json").read_text())
                self.assertEqual(manifest["format_version"], version)

    def test_old_names_of_keys_are_named_once(self):
        outcome = self.pretrain("parallel.data=1", "training.steps=3")
        self.assertSucceeds(outcome)
        for warning in ("parallel.tensor in tiny.yaml:3 is now called parallel.tp",
                        "training.global_batch in tiny.yaml:6 is now called training.global_batch_size",
                        "parallel.data in the override parallel.data=1 is now called parallel.dp"):
            self.assertEqual(outcome.stdout.count(f"warning: {warning}\n"), 1, outcome.stdout)
        self.assertEqual(outcome.stdout.count("is now called"), 3, outcome.stdout)

    def test_its_model_captions(self):
        for ranks in (1, 2):
            outcome = self.mpirun(ranks, PROGRAM, "generate", "--checkpoint", "run/checkpoints/step-00000002", "--image",
                                  "p/red.png", text=False)
            self.assertEqual(outcome.returncode, 0, outcome.stdout)
            self.assertIn(b"[\t\xef\xbf\xbdu\xef\xbf\xbd\xd2\xb0)\x10Z", outcome.stdout)


class Scripts(FieldTest):
    """The scripts with fake launchers, in a folder that looks like a built clone."""

    def setUp(self):
        super().setUp()
        for folder in ("scripts", "build/bin", "configs", "fake"):
            (self.folder / folder).mkdir(parents=True)
        for name in ("common.sh", "pretrain.sh", "slurm_pretrain.sh"):
            (self.folder / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
            (self.folder / "scripts" / name).chmod(0o755)
        self.fake("scripts/build.sh", "exit 0")
        self.fake("build/bin/step37", "exit 0")
        self.fake("fake/scontrol", 'echo "scontrol $*"')
        (self.folder / "build/CMakeCache.txt").write_text(f"MPIEXEC_EXECUTABLE:FILEPATH={self.folder}/fake/mpirun\n")
        (self.folder / "f.yaml").write_text("run: {fresh: true}\n")
        self.environment = {"PATH": f"{self.folder}/fake:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                            "SLURM_SUBMIT_DIR": str(self.folder), "HOME": str(self.folder)}

    def fake(self, name, script):
        (self.folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (self.folder / name).chmod(0o755)

    # A launcher that says when it can be sent a signal, and how it ends at the first.
    WAITS = """trap 'echo "signal USR1"; exit {status}' USR1
    trap 'echo "another signal"; exit 99' INT TERM
    [[ $* == *--mpi=list* ]] && {{ echo pmix; exit; }}
    [[ $* == *pretrain* ]] || {{ echo "mpirun (Open MPI) 4.1.4"; exit; }}
    echo "started $*"
    mkfifo never.$$; exec 3<>never.$$
    while :; do read -r -u 3 -t 60; done"""

    def test_what_slurm_starts_again_goes_on(self):
        self.fake("fake/srun", '[[ $* == *--mpi=list* ]] && { echo pmix; exit; }; echo "srun $*"')
        for count, last in (("", "run.fresh=true"), ("0", "run.fresh=true"), ("1", "run.fresh=false")):
            outcome = self.command("scripts/slurm_pretrain.sh", "--config", "f.yaml", "run.fresh=true",
                                   environment={**self.environment, "SLURM_RESTART_COUNT": count})
            self.assertSucceeds(outcome)
            self.assertTrue(outcome.stdout.splitlines()[-1].endswith(last), outcome.stdout)
        outcome = self.command("scripts/slurm_pretrain.sh", "--config", "f.yaml",
                               environment={**self.environment, "SLURM_RESTART_COUNT": "2"})
        self.assertTrue(outcome.stdout.splitlines()[-1].endswith(" run.fresh=false"), outcome.stdout)

    def test_slurms_signal_reaches_the_ranks_before_the_job_is_queued_again(self):
        for launcher in ("srun", "mpirun"):
            for status, queued in ((INTERRUPTED, True), (0, False)) if launcher == "srun" else ((137, True), (1, False)):
                for name in ("srun", "mpirun"):
                    self.fake(f"fake/{name}", self.WAITS.format(status=status))
                if launcher == "mpirun":
                    self.fake("fake/srun", "echo none")
                job = Process(self, "scripts/slurm_pretrain.sh", "--config", "f.yaml", environment=self.environment)
                job.wait_for("started ")
                job.popen.send_signal(signal.SIGUSR1)
                self.assertEqual(job.finish(), status, job.output)
                self.assertEqual(job.output.count("signal USR1"), 1, job.output)
                self.assertEqual(job.output.count("scontrol requeue 7"), 2 if queued else 0, job.output)  # + its echo

    def test_suspected_hosts_are_left_out_and_other_errors_end_the_job(self):
        said = ("error: step 9: loss nan and gradient norm 1 are not all finite, and repeated with the same batch they are loss "
                "inf and gradient norm 1: the numbers of rank 1 on node7, rank 2 on node7, rank 4 on node12.cluster changed, "
                "which points to a fault of that machine")
        srun = '[[ $* == *--mpi=list* ]] && {{ echo pmix; exit; }}; echo "{said}" >&2; exit {status}'
        for excluded, hosts in (("(null)", "node12,node7"), ("node[2-3]", "node[2-3],node12,node7")):
            self.fake("fake/scontrol", f'[[ $1 != show ]] || {{ echo "   ExcNodeList={excluded}"; exit; }}; echo "scontrol $*"')
            for status in (SUSPECTED_HOST, NOT_FINITE, CANNOT_WRITE, INTERRUPTED, 1):
                self.fake("fake/srun", srun.format(said=said, status=status))
                outcome = self.command("scripts/slurm_pretrain.sh", "--config", "f.yaml", environment=self.environment)
                self.assertEqual(outcome.returncode, status, outcome.stdout)
                self.assertEqual(outcome.stdout.count(said), 1, outcome.stdout)
                for command in ("scontrol requeue 7", f"scontrol update JobId=7 ExcNodeList={hosts}"):
                    self.assertEqual(outcome.stdout.count(f"\n{command}\n"), 1 if status == SUSPECTED_HOST else 0,
                                     outcome.stdout)
        self.fake("fake/srun", srun.format(said="", status=SUSPECTED_HOST))
        outcome = self.command("scripts/slurm_pretrain.sh", "--config", "f.yaml", environment=self.environment)
        self.assertEqual(outcome.returncode, SUSPECTED_HOST, outcome.stdout)
        self.assertNotIn("requeue", outcome.stdout)  # it would start on the same hosts

    def test_pretrain_sh_turns_signals_into_one_that_mpirun_passes_on(self):
        self.fake("fake/mpirun", self.WAITS.format(status=INTERRUPTED))
        for to_group, number in ((False, signal.SIGTERM), (True, signal.SIGINT)):
            script = Process(self, "scripts/pretrain.sh", "--config", "f.yaml", "data.directory=p",
                             environment=self.environment, start_new_session=True)
            script.wait_for("started ")
            (os.killpg if to_group else os.kill)(script.popen.pid, number)
            self.assertEqual(script.finish(), INTERRUPTED, script.output)
            self.assertEqual(script.output.count("signal USR1"), 1, script.output)
            self.assertNotIn("another signal", script.output)


if __name__ == "__main__":
    unittest.main()
