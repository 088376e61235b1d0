"""What tests in several folders start from."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests")  # helpers fail with details, too

from hf_lowrank.compression import recipe  # noqa: E402
from tests.tiny_models import Batch, tiny_llama, written_batches  # noqa: E402


@pytest.fixture(autouse=True)
def ranks_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves open is ranks alone, but for tests of what is chosen by default."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        if "default_recipe" not in request.keywords:
            for name in recipe.RECIPES:
                patch.setitem(recipe.RECIPES, name, {"channels": False, "measured_prices": False})
        yield


@pytest.fixture(scope="session")
def text() -> list[Batch]:
    """Twelve batches that the dense tiny Llama wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)
