"""A reward model's scores in transformers, alone and in a padded batch, are ours."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jalign.rewards.scorer import judged_tokens  # noqa: E402
from tests.rewards import seams  # noqa: E402


def their_scores(folder, rows: list[list[int]]):
    """(one by one, in one padded batch): float [B]."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model, tokenizer = (
        load(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits.item() for row in rows]
        padded = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    return np.array(alone), padded.numpy()


@pytest.mark.parametrize("kind", seams.KINDS)
@pytest.mark.parametrize("template", seams.TEMPLATES)
def test_transformers_reads_the_same_score(template, kind, tmp_path):
    scores, samples, exported = seams.all_scores(kind, template, tmp_path)
    ids = [row.tolist() for row in judged_tokens(exported.tokenizer, samples)]
    for theirs in their_scores(tmp_path, ids):
        np.testing.assert_allclose(theirs, scores["rollout"], atol=1e-4)
    # And from the texts, by the exported template or with the EOS behind a text.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if template == "text":
        pairs = zip(samples.prompts, samples.completions, strict=True)
        texts = [prompt + answer + theirs.eos_token for prompt, answer in pairs]
        ids = theirs(texts)["input_ids"]
    else:
        rows = seams.pair_rows(samples)
        turns = [row["prompt"] + row["chosen"] for row in rows]
        ids = theirs.apply_chat_template(turns, tokenize=True)["input_ids"]
    again = their_scores(tmp_path, ids[:8])[1]
    np.testing.assert_allclose(again, scores["rollout"][:8], atol=1e-4)
