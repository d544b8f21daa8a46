import jax
import numpy as np

from jalign import forward
from jalign.train import measured
from tests.train import tiny


def test_logps_in_the_examples_order_and_cached(tmp_path, monkeypatch):
    model = tiny.model()
    params = model.init(jax.random.key(0))
    pairs, cache = tiny.pairs(5), tmp_path / "reference.npz"

    def fill(params=params):
        return measured.reference_examples(
            model,
            params,
            {"train": pairs},
            batch_size=2,
            max_length=16,
            cache=cache,
        )["train"]

    found = fill()
    batch = tiny.pair_batch(5)
    fn = forward.make_reference_fn(model)
    for name, want in zip(("chosen", "rejected"), fn(params, batch), strict=True):
        got = [getattr(pair, f"ref_{name}_logp") for pair in found]
        np.testing.assert_allclose(got, want[:, 0], rtol=1e-4)
    monkeypatch.setattr(measured, "reference_logps", None)  # may not be called again
    assert [p.ref_chosen_logp for p in fill()] == [p.ref_chosen_logp for p in found]
    monkeypatch.undo()
    other = fill(model.init(jax.random.key(1)))
    assert other[0].ref_chosen_logp != found[0].ref_chosen_logp
    cache.write_bytes(b"torn")
    assert fill()[0].ref_chosen_logp == found[0].ref_chosen_logp
