"""Machines: what the scripts make of limits, launchers, packages, paths and sources that others have met.

The scripts run in a folder that looks like a clone, under a name with a blank, and with fake tools first in PATH, each of which
prints what it was given.
"""
import os
import re
import shlex
import shutil
import unittest

from field import ROOT, FieldTest

OPEN_MPI = "mpirun (Open MPI) 4.1.4"
HYDRA = "HYDRA build details:"


class MachineTest(FieldTest):
    def setUp(self):
        super().setUp()
        self.clone = self.folder / "my clone"
        self.tools = self.folder / "tools"
        self.tools.mkdir()
        (self.clone / "build/bin").mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.clone / "scripts")
        shutil.copytree(ROOT / "configs", self.clone / "configs")
        self.tool("sudo", 'exec "$@"')
        self.tool("cmake", 'echo "CMAKE $*"')
        self.missing()
        self.tool("apt-get", 'echo "APT $*"')
        self.tool("dpkg", 'echo "DPKG $*"')

    def tool(self, name, lines, folder=None):
        path = (folder or self.tools) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/bash\n" + lines + "\n")
        path.chmod(0o755)
        return path

    def missing(self, *packages):
        """What dpkg-query doesn't call installed."""
        names = "|".join(packages) or "-"
        self.tool("dpkg-query", f'case "${{@: -1}}" in {names}) exit 1;; esac; printf installed')

    def script(self, name, *words, **options):
        environment = {"PATH": f"{self.tools}:{os.environ['PATH']}", "Torch_ROOT": "/torch", **options.pop("environment", {})}
        return self.command("env", *options.pop("unset", []), self.clone / "scripts" / name, *words, environment=environment,
                            **options)

    def common(self, lines, **options):
        """Lines of bash, after scripts/common.sh; self.folder/system stands for /."""
        text = f"system={shlex.quote(str(self.folder / 'system'))}\nsource {shlex.quote(str(ROOT / 'scripts/common.sh'))}\n{lines}"
        return self.command("bash", "-c", text, **options)

    def system_file(self, path, text):
        path = self.folder / "system" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def prepare_pretrain(self, version=OPEN_MPI):
        """The build is there, and its launcher prints its arguments, one a line."""
        self.tool("build.sh", "exit 0", self.clone / "scripts")
        launcher = self.tool("their mpiexec", f'[[ $1 == --version ]] && echo "{version}" || printf "<%s>\\n" "$@"')
        (self.clone / "build/CMakeCache.txt").write_text(f"MPIEXEC_EXECUTABLE:FILEPATH={launcher}\n")
        self.tool("mpirun", "echo the mpirun of another MPI; exit 1")


class PackagesTest(MachineTest):
    def test_ubuntu_has_no_libjpeg62_turbo_dev(self):
        self.missing("libjpeg62-turbo-dev", "libjpeg-dev")
        self.tool("apt-get", 'case "$*" in *libjpeg62*) exit 100;; esac; echo "APT $*"')
        outcome = self.script("build.sh")
        self.assertSucceeds(outcome)
        self.assertRegex(outcome.stdout, r"APT install .* libjpeg-dev\n")
        self.missing("libjpeg-dev")  # Debian's, set up before
        self.assertNotIn("APT", self.script("build.sh").stdout)

    def test_a_source_of_apt_does_not_answer(self):
        self.missing("libstb-dev")
        self.tool("apt-get", 'case "$*" in *update*) exit 100;; esac; echo "APT $*"')
        outcome = self.script("build.sh")
        self.assertSucceeds(outcome)
        self.assertRegex(outcome.stdout, r"warning: apt-get update failed(.|\n)*APT install .*libstb-dev(.|\n)*CMAKE --build")

    def test_a_package_that_this_release_lacks(self):
        self.missing("clang-14")
        self.tool("apt-get", 'case "$*" in *install*) exit 100;; esac')
        outcome = self.script("build.sh", "--preset", "fuzz")
        self.assertFails(outcome, "apt-get can't install: clang-14.")
        self.assertIn("Debian 12", outcome.stdout)
        self.assertNotIn("CMAKE", outcome.stdout)

    def test_pictures_when_a_source_does_not_answer(self):
        # Without lists there is no package at first, and the update that would bring them fails for another source.
        apt = f'''case $1 in
update) touch {self.folder}/updated; exit 100 ;;
download) [[ -e {self.folder}/updated ]] && touch tuxpaint-stamps-default_1.deb ;;
esac'''
        self.tool("apt-get", apt)
        self.tool("dpkg-deb", 'mkdir -p "$3/usr/share/tuxpaint/stamps"')
        outcome = self.script("fetch_tuxpaint.sh", environment={"XDG_CACHE_HOME": str(self.folder / "a cache")})
        self.assertSucceeds(outcome)
        self.assertTrue((self.clone / "data/tuxpaint").is_dir())

        self.tool("apt-get", "exit 100")
        outcome = self.script("fetch_tuxpaint.sh", environment={"XDG_CACHE_HOME": str(self.folder / "other")})
        self.assertFails(outcome, "apt-get can't download tuxpaint-stamps-default")


class CacheTest(MachineTest):
    def test_no_home(self):
        unset = ["-u", "HOME", "-u", "XDG_CACHE_HOME"]
        for script in sorted(path.name for path in (ROOT / "scripts").glob("*.sh") if path.name not in
                             ("common.sh", "slurm_pretrain.sh")):
            self.assertSucceeds(self.script(script, "--help", unset=unset))
        self.assertSucceeds(self.script("build.sh", unset=unset))
        outcome = self.script("build.sh", unset=unset, environment={"Torch_ROOT": ""})
        self.assertFails(outcome, "set XDG_CACHE_HOME")
        self.assertNotIn("CMAKE", outcome.stdout)

    def test_no_room_for_libtorch(self):
        self.tool("df", 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "/dev/x 9 9 2000000 90% /"')
        outcome = self.script("build.sh", environment={"Torch_ROOT": "", "XDG_CACHE_HOME": str(self.folder / "a cache")})
        self.assertFails(outcome, "no room for torch-")
        self.assertIn("2.0 GB are free", outcome.stdout)
        self.assertNotIn("venv", outcome.stdout.replace("python3-venv", ""))


class LimitsTest(MachineTest):
    def setUp(self):
        super().setUp()
        self.tool("nproc", "echo ${OMP_NUM_THREADS:-64}")
        self.system_file("proc/meminfo", "MemTotal: 264000000 kB\nMemAvailable: 262144000 kB\n")

    def limits(self, **environment):
        outcome = self.common("echo $(cores) $(available_memory) $(compile_jobs)",
                              environment={"PATH": f"{self.tools}:{os.environ['PATH']}", **environment})
        self.assertSucceeds(outcome)
        return tuple(int(word) for word in outcome.stdout.split())

    def test_none(self):
        self.assertEqual(self.limits(), (64, 256000, 64))

    def test_threads_are_not_jobs(self):
        self.assertEqual(self.limits(OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="1"), (64, 256000, 64))

    def test_control_groups_2(self):
        self.system_file("proc/self/cgroup", "0::/user/job\n")
        group = "sys/fs/cgroup/user/job/"
        self.system_file(group + "cpu.max", "max 100000\n")
        self.system_file(group + "memory.max", "max\n")
        self.assertEqual(self.limits(), (64, 256000, 64))
        self.system_file(group + "cpu.max", "450000 100000\n")
        self.system_file(group + "memory.max", str(20 << 30))
        self.system_file(group + "memory.current", str(17 << 30))
        self.system_file(group + "memory.stat", f"anon 1\ninactive_file {1 << 30}\nactive_file {2 << 30}\n")
        self.assertEqual(self.limits(), (4, 6 * 1024, 3))
        self.system_file(group + "memory.high", str(19 << 30))
        self.assertEqual(self.limits(), (4, 5 * 1024, 2))
        self.system_file("sys/fs/cgroup/user/cpu.max", "50000 100000\n")  # of the group above it
        self.assertEqual(self.limits()[0], 1)

    def test_control_groups_1_in_a_container(self):
        # The path is the host's, and not seen here.
        self.system_file("proc/self/cgroup", "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
        self.system_file("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
        self.system_file("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
        self.system_file("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
        self.assertEqual(self.limits(), (64, 256000, 64))
        self.system_file("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
        self.system_file("sys/fs/cgroup/memory/memory.limit_in_bytes", str(4 << 30))
        self.system_file("sys/fs/cgroup/memory/memory.usage_in_bytes", str(1 << 30))
        self.assertEqual(self.limits(), (3, 3 * 1024, 1))


class LauncherTest(MachineTest):
    def test_the_one_of_the_build(self):
        self.prepare_pretrain()
        outcome = self.script("pretrain.sh", "--ranks", "3", "data.directory=p")
        self.assertSucceeds(outcome)
        self.assertIn("<--oversubscribe>\n<--bind-to>\n<none>\n<-np>\n<3>\n", outcome.stdout)
        self.prepare_pretrain(HYDRA)  # MPICH's knows no such flags
        outcome = self.script("pretrain.sh", "data.directory=p")
        self.assertSucceeds(outcome)
        self.assertIn("\n<-np>\n<2>\n", outcome.stdout)
        self.assertNotIn("oversubscribe", outcome.stdout)

    def test_removed_since(self):
        self.prepare_pretrain()
        (self.tools / "their mpiexec").unlink()
        self.assertFails(self.script("pretrain.sh", "data.directory=p"), "isn't there: build again")

    def test_of_another_mpi_than_the_compiler(self):
        def configure(version, mpi):
            launcher = self.tool("their mpiexec", f'echo "{version}"')
            return self.command(shutil.which("cmake"), f"-DMPIEXEC_EXECUTABLE={launcher}", "-DMPI_CXX_COMPILER=mpicxx",
                                f"-DMPI_CXX_LIBRARY_VERSION_STRING={mpi}", "-P", ROOT / "cmake/MpiLauncher.cmake")
        self.assertSucceeds(configure(OPEN_MPI, "Open MPI v4.1.4"))
        self.assertSucceeds(configure(HYDRA, "MPICH Version: 4.0"))
        self.assertSucceeds(configure("slurm 22.05", "Open MPI v4.1.4"))
        self.assertFails(configure(HYDRA, "Open MPI v4.1.4"), "-DMPIEXEC_EXECUTABLE=")
        self.assertFails(configure(OPEN_MPI, "MPICH Version: 4.0"), "-DMPIEXEC_EXECUTABLE=")

    def test_slurm_without_pmix(self):
        self.prepare_pretrain(HYDRA)
        self.tool("srun", "echo '  pmi2'")
        self.tool("step37", "exit 1", self.clone / "build/bin")
        outcome = self.script("slurm_pretrain.sh", environment={"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(self.clone)})
        self.assertIn("<build/bin/step37>\n<pretrain>\n", outcome.stdout)
        self.assertNotIn("bind-to", outcome.stdout)


class DeviceTest(MachineTest):
    def started(self, gpus, *words, nccl="ON", visible=None, config=None):
        """The ranks and the device that pretrain.sh asks for on a machine with so many GPUs."""
        self.prepare_pretrain()
        with (self.clone / "build/CMakeCache.txt").open("a") as cache:
            cache.write(f"MCPP_BUILT_WITH_NCCL:INTERNAL={nccl}\n")
        self.tool("nvidia-smi", f'for ((i = 0; i < {gpus}; ++i)); do echo "GPU $i: a card"; done')
        (self.folder / "mine.yaml").write_text(config or "data: {directory: p}\n")
        choice = {"unset": ["-u", "CUDA_VISIBLE_DEVICES"]}
        if visible is not None:
            choice = {"environment": {"CUDA_VISIBLE_DEVICES": visible}}
        outcome = self.script("pretrain.sh", "--config", "mine.yaml", *words, **choice)
        self.assertSucceeds(outcome)
        return (re.search(r"<-np>\n<(\d+)>", outcome.stdout)[1], *re.findall(r"<run\.device=(\w+)>", outcome.stdout),
                *re.findall(r"<(parallel\..*)>", outcome.stdout))

    def test_pretrain_sh_says_which_device_it_means(self):
        self.assertEqual(self.started(0), ("2", "cpu"))
        self.assertEqual(self.started(1), ("1", "cuda", "parallel.tp=1"))
        self.assertEqual(self.started(4), ("2", "cuda"))
        self.assertEqual(self.started(1, "--ranks", "2"), ("2", "cuda"))  # which the program refuses, and says why
        self.assertEqual(self.started(4, visible="2"), ("1", "cuda", "parallel.tp=1"))
        for setting in "parallel.tp=0", "parallel.tensor=0":
            self.assertEqual(self.started(0, "--ranks", "1", setting), ("1", "cpu", setting))
        for nothing in "", "-1", "-1,0":
            self.assertEqual(self.started(4, visible=nothing), ("2", "cpu"))
        self.assertEqual(self.started(1, nccl="OFF"), ("2", "cpu"))
        self.assertEqual(self.started(1, "run.device=cpu"), ("2", "cpu"))
        self.assertEqual(self.started(1, config="run: {fresh: true, device: cpu}\n"), ("2",))
        self.assertEqual(self.started(1, config="run:\n  device: auto\n"), ("2",))

    def test_slurm_with_gpus(self):
        self.prepare_pretrain()
        self.tool("srun", '[[ $* == *--mpi=list* ]] && echo pmix || printf "<%s>\\n" "$@"')
        self.tool("step37", "exit 1", self.clone / "build/bin")
        for variables, device in (({}, []), ({"SLURM_GPUS_ON_NODE": "0"}, []), ({"SLURM_GPUS_ON_NODE": "2"}, ["cuda"]),
                                  ({"SLURM_JOB_GPUS": "0"}, ["cuda"])):  # a list: number 0
            outcome = self.script("slurm_pretrain.sh", environment={
                "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(self.clone), **variables})
            self.assertEqual(re.findall(r"<run\.device=(\w+)>", outcome.stdout), device)


class PathsTest(MachineTest):
    def test_relative_to_where_the_user_stands(self):
        self.prepare_pretrain()
        outcome = self.script("pretrain.sh", "data.directory=my pictures", "run.directory=../r")
        self.assertSucceeds(outcome)
        self.assertIn(f"<data.directory={self.folder}/my pictures>\n<run.directory={self.folder}/../r>\n", outcome.stdout)
        (self.folder / "mine.yaml").write_text("data: {directory: p}\n")
        self.tool("their mpiexec", f'[[ $1 == --version ]] || {{ pwd; printf "<%s>\\n" "$@"; }}')
        outcome = self.script("pretrain.sh", "--config", "mine.yaml")  # so that its folders are this one's, too
        self.assertIn(f"\n{self.folder}\n", outcome.stdout)
        self.assertIn(f"<{self.clone}/build/bin/step37>\n", outcome.stdout)
        outcome = self.script("pretrain.sh", "--config", self.folder / "mine.yaml", cwd=self.clone)
        self.assertIn("<build/bin/step37>\n", outcome.stdout)
        self.assertFails(self.script("pretrain.sh", "--config", "none.yaml"), "none.yaml: there is no such file")

    def test_torch_root(self):
        for words, environment in (["-DTorch_ROOT=my/torch"], {}), ([], {"Torch_ROOT": "my/torch"}):
            outcome = self.script("build.sh", *words, environment=environment)
            self.assertSucceeds(outcome)
            self.assertIn(f"-DTorch_ROOT={self.folder}/my/torch", outcome.stdout)

    def test_home_that_nobody_expanded(self):
        self.prepare_pretrain()
        for setting in "run.directory=~/runs", "data.directory=~/p", "data.directory=~":
            outcome = self.script("pretrain.sh", setting)
            self.assertFails(outcome, "starts with ~, which isn't expanded here")
            self.assertNotIn("-np", outcome.stdout)
        shutil.copy(ROOT / "scripts/build.sh", self.clone / "scripts")
        self.assertFails(self.script("build.sh", "-DTorch_ROOT=~/torch"), "starts with ~")

    def test_printed_commands_can_be_pasted(self):
        self.prepare_pretrain()
        outcome = self.script("pretrain.sh", "data.directory=p", "run.directory=my run/r $1; 'x'", "a.b=*")
        printed = re.search(r"^\+ (.*)$", outcome.stdout, re.M)[1]
        again = self.command("bash", "-c", printed)
        self.assertSucceeds(again)
        self.assertEqual(again.stdout, outcome.stdout.split(printed + "\n")[1])
        self.assertIn(f"<run.directory={self.folder}/my run/r $1; 'x'>\n<a.b=*>\n", again.stdout)


if __name__ == "__main__":
    unittest.main()
