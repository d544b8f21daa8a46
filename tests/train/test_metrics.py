"""Rows come one step late, in order, whole; a continued run cuts what came after."""

import errno
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import Model, quantize, quantized
from jalign.train import metrics
from jalign.train.metrics import MetricsWriter, truncate_rows
from tests.train import tiny


def device(loss, tokens=10.0, skipped=0.0):
    values = dict(
        zeta=1.0,
        loss=loss,
        grad_norm=2.0,
        learning_rate=0.1,
        num_tokens=tokens,
        skipped=skipped,
    )
    return {name: jnp.float32(value) for name, value in values.items()}


def rows(path):
    return [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]


def test_one_step_late_then_flushed(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=3)
    assert writer.log(1, device(3.0)) is None
    assert writer.log(2, device(2.0))["step"] == 1
    assert len(rows(tmp_path)) == 1
    assert writer.flush()["num_tokens"] == 20
    assert writer.flush() is None
    writer.log(3, device(np.nan))
    writer.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert [row["loss"] for row in found] == [3.0, 2.0, None]
    first = "step loss learning_rate grad_norm num_tokens step_time tokens_per_second"
    assert list(found[0])[:7] == first.split()
    assert found[1]["tokens_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_flushed_row_has_the_time_of_its_own_step(tmp_path):
    """The row before a checkpoint was once written with the time of its flush."""
    writer = MetricsWriter(tmp_path, total_steps=2)
    for step in (1, 2):
        time.sleep(0.2)
        writer.log(step, device(1.0))
    writer.flush()
    writer.close()
    assert all(0.15 < row["step_time"] < 10 for row in rows(tmp_path))


def test_continued_run_cuts_later_rows(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=9)
    for step in range(1, 6):
        writer.log(step, device(float(step)))
    writer.close()
    writer = MetricsWriter(tmp_path, total_steps=9, start_step=3, num_tokens=30.0)
    writer.log(4, device(40.0))
    writer.close()
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 3, 40]
    assert rows(tmp_path)[-1]["num_tokens"] == 40


def test_a_torn_line_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    truncate_rows(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_flops_count_matrices_once():
    shapes = tiny.model().param_shapes()
    per_layer = 32 * (4 + 2 + 2 + 4) * 8 + 3 * 32 * 48
    tied = tiny.VOCAB * 32
    assert metrics.training_flops_per_token(shapes) == 6 * (2 * per_layer + tied)


@pytest.mark.parametrize("method", quantize.METHODS)
def test_flops_of_quantized_kernels_are_those_of_their_weights(method):
    wide = tiny.config(hidden_size=64, intermediate_size=128, num_heads=8)
    params = Model(wide).param_shapes()
    small = jax.eval_shape(lambda p: quantized.quantize_params(p, method), params)
    assert jax.tree.structure(small) != jax.tree.structure(params)
    per_token = metrics.training_flops_per_token
    assert per_token({}, small) == per_token({}, params) > 0


def test_a_disk_that_has_space_again_gets_every_row(tmp_path, monkeypatch, caplog):
    class Full:
        name, taken = "metrics.jsonl", 5

        def write(self, text):
            if not Full.taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            Full.taken, taken = 0, Full.taken
            return file.write(text[:taken])

        def close(self):
            file.close()

    writer = MetricsWriter(tmp_path, total_steps=3)
    file, writer._file = writer._file, Full()
    for step in (1, 2):
        writer.log(step, device(float(step)))
        writer.flush()
    assert caplog.text.count("No space left") == 1
    writer._file = file
    writer.log(3, device(3.0))
    writer.close()
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 3]


def test_curves_of_a_full_disk_are_not_waited_for(tmp_path):
    """tensorboardX's thread ends at the first error; its queue then fills up."""
    writer = MetricsWriter(tmp_path, total_steps=500)
    worker = writer._board.file_writer.event_writer._worker
    worker.stop()
    for step in range(1, 400):
        writer.log(step, device(1.0))
    assert len(rows(tmp_path)) == 398
    writer._board = None
    writer.close()
