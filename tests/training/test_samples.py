import pytest
import torch

from training.samples import Sample, pack, packs


def sample(n, prompt=2):
    return Sample(list(range(n)), [0.0] * prompt + [1.0] * (n - prompt))


def test_pack():
    p = pack([sample(5), Sample([9, 8, 7], [0, 0.5, 0], [1, 2, 3], [0, -4, 0])])
    assert p.tokens.tolist() == [0, 1, 2, 3, 9, 8] and p.cu_seqlens.tolist() == [0, 4, 6]
    assert p.where.tolist() == [1, 2, 3, 4] and p.targets.tolist() == [2, 3, 4, 8]
    assert p.weights.tolist() == [1, 1, 1, 0.5] and p.advantages.tolist() == [0, 0, 0, 2] and p.logprobs.tolist() == [0, 0, 0, -4]
    assert p.lengths.tolist() == [3, 1] and p.cu_seqlens.dtype == torch.int32


def test_packs_are_few_and_hold_every_trained_sample_once():
    found = packs([sample(n) for n in (9, 4, 7, 3, 11, 5)] + [Sample([1, 2], [0, 0])], 12)
    assert [len(p.tokens) for p in found] == [12, 12, 9] and sum(len(p.lengths) for p in found) == 6
    with pytest.raises(ValueError, match="has 19 input tokens; expected at most tokens_per_pack 12"):
        packs([sample(20)], 12)


def test_expert_ids_go_with_their_tokens():
    class Model:
        def __call__(self, tokens, **options):
            self.options = options
            return torch.zeros(len(tokens), 4)

    with_ids = [Sample([1, 2, 3], [0, 0, 1], experts=torch.full((2, 1, 2), i)) for i in (5, 6)]
    model = Model()
    assert pack(with_ids).hidden(model).shape == (2, 4)
    (layer,) = model.options["expert_ids"]
    assert layer[:, 0].tolist() == [5, 5, 6, 6] and layer.shape == (4, 2) and layer.dtype == torch.int64
    pack([sample(4)]).hidden(model)
    assert "expert_ids" not in model.options
    with pytest.raises(ValueError, match="some samples have experts"):
        pack([with_ids[0], sample(4)])


@pytest.mark.parametrize("values, words", [
    (([1], [0]), "at least 2"), (([1, 2], [0]), "weights has 1 entries; expected 2"), (([1, 2], [1, 1]), r"weights\[0\] is 1"),
    (([1, 2], [0, 1], [1.0]), "advantages has 1"), (([1, 2], [0, 1], None, None, torch.zeros(2, 1, 1)), "experts has 2 entries; expected 1"),
])
def test_bad_samples(values, words):
    with pytest.raises(ValueError, match=words):
        Sample(*values)
    with pytest.raises(ValueError, match="none of the 1 samples"):
        pack([Sample([1, 2], [0, 0])])
