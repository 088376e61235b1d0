"""What tests in several folders start from."""

from pathlib import Path

import pytest

for _path in Path(__file__).parent.iterdir():  # helpers fail with details, too
    if _path.suffix == ".py" and _path.stem not in ("__init__", "conftest"):
        pytest.register_assert_rewrite(f"tests.{_path.stem}")
    elif (_path / "__init__.py").exists():
        pytest.register_assert_rewrite(f"tests.{_path.name}")

from tests.tiny_models import Batch, tiny_llama, written_batches  # noqa: E402


@pytest.fixture(scope="session")
def text() -> list[Batch]:
    """Twelve batches that the dense tiny Llama wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)
