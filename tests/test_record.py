"""What a run leaves behind: metrics.jsonl and TensorBoard tell the same."""

import dataclasses
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from odit import config, record


def curves(out):
    """{name: {step: value}} as TensorBoard shows it."""
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: {point.step: point.value for point in board.Scalars(name)} for name in board.Tags()["scalars"]}


def test_tensorboard_shows_the_curves_of_metrics(tmp_path):
    """In 32 bits, without what is not finite and what is no number; after a resume without the steps that were lost."""
    run = dataclasses.replace(config.Run(), out=tmp_path)
    with record.Recorder(run) as recorder:
        for step in range(1, 7):
            recorder.log(step, {"loss": 1 / step, "bad": "x", "gap": math.nan if step == 2 else step})
        assert curves(tmp_path)["loss"].keys() == {1, 2, 3, 4, 5, 6}  # nothing waits for the end
    with record.Recorder(run, step=3) as recorder:
        for step in (4, 5):
            recorder.log(step, {"loss": 7.0}, prefix="validation_")
            recorder.log(step, {"loss": 2.0 * step, "gap": step})
    found, lines = curves(tmp_path), record.read_metrics(tmp_path / "metrics.jsonl")
    assert found.keys() == {"loss", "gap", "validation_loss"} and len(lines) == 7
    for name in found:
        want = {step: float(math.nan if value is None else value) for step, value in record.curve(lines, name).items()}
        assert found[name].keys() == want.keys()
        assert all(math.isclose(found[name][step], want[step], rel_tol=1e-7) for step in want)
    assert found["loss"] == {1: 1.0, 2: 0.5, 3: found["loss"][3], 4: 8.0, 5: 10.0} and 2 not in found["gap"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
