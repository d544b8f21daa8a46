"""The tiny models that several tests of the training room share."""

import jax
import pytest

from tests.train import tiny

KEY = jax.random.key(0)


@pytest.fixture(scope="session")
def language_model():
    model = tiny.model()
    return model, model.init(KEY)


@pytest.fixture(scope="session")
def scored_model():
    model = tiny.model(num_labels=1)
    return model, model.init(KEY)
