import pytest

from training import environment


@pytest.mark.parametrize("git,env,expected", [(True, "x", None), (False, "x", "x"), (False, None, "unknown")])
def test_commit(git, env, expected, monkeypatch, tmp_path):
    monkeypatch.delenv("QWEN3_COMMIT", raising=False)
    if env:
        monkeypatch.setenv("QWEN3_COMMIT", env)
    if not git:
        monkeypatch.setattr(environment, "ROOT", tmp_path)
        assert environment.commit() == expected
    elif (environment.ROOT / ".git").exists():
        assert len(environment.commit().removesuffix("-dirty")) == 40
