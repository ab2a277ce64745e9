from functools import partial

import pytest
from small_run import small, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(text, tmp_path):
    """Makes configurations that differ from the small run's in what is given."""
    return partial(small, text, tmp_path)
