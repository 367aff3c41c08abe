"""Event files, as TensorBoard's own package reads them."""
import json
import os
import subprocess
import unittest

from field import ROOT, FieldTest

# TensorBoard without what only its server needs.
ENVIRONMENT = "tensorboard-2.21.0-1"
PACKAGES = ["--no-deps", "tensorboard==2.21.0", "numpy==2.2.6", "protobuf==6.33.0", "absl-py==2.3.1", "packaging", "six"]
READER = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print(json.dumps({tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


def tensorboard_python():
    command = 'source "$0"; python_environment "$@" >&2; echo "$cache"'
    made = subprocess.run(["bash", "-c", command, ROOT / "scripts/common.sh", ENVIRONMENT, *PACKAGES], check=True,
                          stdout=subprocess.PIPE, text=True)
    return f"{made.stdout.strip()}/{ENVIRONMENT}/bin/python"


class TensorBoardTest(FieldTest):
    def assertEventsAreTheMetrics(self, run):
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        expected = {}
        for line in lines:
            for name, value in line.items():
                if name != "step":
                    expected.setdefault(name, []).append([line["step"], value])
        read = self.command(tensorboard_python(), "-c", READER, self.folder / run / "tensorboard")
        self.assertSucceeds(read)
        events = json.loads(read.stdout.splitlines()[-1])
        self.assertEqual(events.keys(), expected.keys())
        for name, values in expected.items():
            self.assertEqual([step for step, _ in events[name]], [step for step, _ in values], name)
            for (step, value), (_, wanted) in zip(events[name], values):
                self.assertAlmostEqual(value, wanted, delta=1e-6 * abs(wanted), msg=f"{name} of step {step}")

    def test_a_run_that_went_back_has_each_step_once(self):
        self.add_pictures()
        settings = ["run.directory=r", "validation.interval=2", "data.held_out=0.5", "checkpoint.interval=2"]
        self.assertSucceeds(self.pretrain(*settings, "training.steps=4"))
        # As if it had been killed before the checkpoint of step 4.
        self.command("rm", "-r", "r/checkpoints/step-00000004", "r/checkpoints/latest")
        self.assertSucceeds(self.pretrain(*settings, "training.steps=6", "training.learning_rate=1e-2"))
        self.assertEqual(len(os.listdir(self.folder / "r/tensorboard")), 2)
        self.assertEventsAreTheMetrics("r")

    def test_it_can_be_switched_off(self):
        self.add_pictures()
        self.assertSucceeds(self.pretrain("run.directory=r", "report.tensorboard=false"))
        self.assertFalse((self.folder / "r/tensorboard").exists())


if __name__ == "__main__":
    unittest.main()
