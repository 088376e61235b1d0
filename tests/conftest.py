"""What tests in several folders start from."""

import pytest

pytest.register_assert_rewrite("tests")  # helpers fail with details, too

from tests.tiny_models import Batch, tiny_llama, written_batches  # noqa: E402


@pytest.fixture(scope="session")
def text() -> list[Batch]:
    """Twelve batches that the dense tiny Llama wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)
