"""What a run says, leaves and returns when numbers aren't finite or files can't be written."""
import json
import re
import shutil
import unittest

from field import CANNOT_WRITE, NOT_FINITE, FieldTest

# Numbers that overflow in the step after the first.
DIVERGES = ("training.learning_rate=1e30", "training.warmup_steps=0", "report.pictures=0")


class Faults(FieldTest):
    def setUp(self):
        super().setUp()
        self.add_pictures()

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


if __name__ == "__main__":
    unittest.main()
