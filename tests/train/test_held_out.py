from jalign import data
from jalign.train import measured, recipe
from jalign.train.config import SFTConfig
from jalign.train.evaluations import Evaluation, Evaluations
from tests.train import tiny


def test_every_example_is_measured_once():
    def count(model, params, batches):
        del model, params
        shapes, starts = set(), 0
        for batch in batches:
            shapes.add(batch.tokens.shape)
            starts += int(((batch.segment_ids > 0) & (batch.positions == 0)).sum())
        return {"examples": starts, "shapes": len(shapes)}

    how = dict(batch_size=4, collate=data.collate_tokens, max_length=16)
    found = measured.measure(count, tiny.model(), {}, tiny.examples(7), **how)
    assert found == {"examples": 7, "shapes": 1}
    assert measured.measure(count, tiny.model(), {}, None, **how) == {}


def test_before_is_shown_where_it_differs():
    found = iter([{"loss": 2.0, "n": 5.0}, {"loss": 1.0, "n": 5.0}])
    config = SFTConfig(model="m", data="d", out="o")
    evaluations = Evaluations(lambda _: Evaluation(next(found), []), config)
    evaluations.measure(0, {})
    evaluations.measure(3, {})
    shown = recipe.before_and_after(evaluations, 3)
    assert shown == {"eval_loss_before": 2.0, "eval_loss": 1.0, "eval_n": 5}


def test_reward_models_write_no_text():
    assert measured.sample_texts(tiny.model(num_labels=1), {}, None, [object()]) == []
