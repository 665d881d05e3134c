import pytest

pytest.importorskip("transformers")

from qwen3_kernels.integrations import transformers as integration  # noqa: E402


@pytest.fixture(autouse=True)
def _reverted():
    """No test leaves a patch behind."""
    yield
    integration.revert()
