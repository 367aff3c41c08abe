"""Another MPI's launcher, and what needs no MPI at all."""
import shutil
import unittest

from field import EMBED_CASE, PROGRAM, FieldTest

# Another MPI than the one that the program is built with: each is named on Debian.
OTHER_LAUNCHER = shutil.which("mpiexec.mpich")


class Launchers(FieldTest):
    def assertRefused(self, outcome, processes, sign):
        self.assertNotEqual(outcome.returncode, 0, outcome.stdout)
        self.assertIn(f"started as one of 2 processes ({sign}=2), but this program's MPI sees 1: start it with the mpirun",
                      outcome.stdout)
        self.assertEqual(outcome.stdout.count("error: started as one of"), processes, outcome.stdout)

    @unittest.skipUnless(OTHER_LAUNCHER, "no mpiexec.mpich")
    def test_another_mpis_launcher_is_refused_before_anything_is_written(self):
        probe = self.command(OTHER_LAUNCHER, "-np", "2", PROGRAM, "pretrain", "--config", "tiny.yaml",
                             "run.directory=r")
        if "started as one of" not in probe.stdout and "no such" not in probe.stdout:
            self.skipTest("the program is built with that launcher's MPI")
        self.assertRefused(probe, 2, "PMI_SIZE")
        self.assertFalse((self.folder / "r").exists())
        outcome = self.command(OTHER_LAUNCHER, "-np", "2", PROGRAM, "embed", "--input", EMBED_CASE, "--output",
                               "o.safetensors", "--sequence-parallel", "--stats", "s.json")
        self.assertRefused(outcome, 2, "PMI_SIZE")
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["tiny.yaml"])

    def test_each_launchers_sign_is_known(self):
        for sign in ("PMI_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            outcome = self.step37("embed", "--input", EMBED_CASE, "--output", "o", environment={sign: "2"})
            self.assertRefused(outcome, 1, sign)
            self.assertFalse((self.folder / "o").exists())

    def test_a_shell_inside_an_allocation_is_no_launcher(self):
        self.assertSucceeds(self.step37("embed", "--input", EMBED_CASE, "--output", "o",
                                        environment={"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}))

    def test_help_version_and_usage_errors_need_no_mpi(self):
        without_mpi = {"OMPI_MCA_pml": "nonsense"}
        for words, status in ((["--help"], 0), (["pretrain", "--help"], 0), (["--version"], 0)):
            outcome = self.step37(*words, environment=without_mpi)
            self.assertEqual(outcome.returncode, status, outcome.stdout)
            self.assertNotIn("MPI_Init", outcome.stdout)
        outcome = self.step37("pretrain", "--confg", "tiny.yaml", environment=without_mpi)
        self.assertFails(outcome, "--config is required")
        self.assertNotIn("MPI_Init", outcome.stdout)

    def test_one_of_several_ranks_speaks(self):
        outcome = self.mpirun(2, PROGRAM, "--version")
        self.assertSucceeds(outcome)
        self.assertEqual(len(outcome.stdout.split()), 1, outcome.stdout)
        self.assertFails(self.mpirun(2, PROGRAM, "pretrian"), "A subcommand is required")


if __name__ == "__main__":
    unittest.main()
