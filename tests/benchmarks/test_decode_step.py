import pytest
import torch

from benchmarks.decode_step import bytes_read, main, plain_logits, routing_of
from benchmarks.train_step import fill
from qwen3_model.config import Qwen3Config
from qwen3_model.model import Qwen3

WIDTH, EXPERT, VOCAB = 32, 24, 96


def model(**changes):
    settings = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT,
    }
    return Qwen3(Qwen3Config(**settings | changes)).bfloat16()


def test_of_a_mixture_only_the_experts_in_use_are_read():
    m = model(tie_word_embeddings=False)
    apart = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [1, 0]])]  # 4 and 2 experts
    embedding, experts = m.model.embed_tokens.weight.nbytes, 2 * 8 * 3 * WIDTH * EXPERT * 2
    whole = sum(p.nbytes for p in m.parameters()) - embedding - m.model.norm.weight.nbytes
    assert bytes_read(m, apart) == whole - experts + 6 * 3 * WIDTH * EXPERT * 2


def test_a_tied_head_is_read_and_a_dense_layer_is_read_whole():
    m = model(num_experts=0, tie_word_embeddings=True)
    assert bytes_read(m, []) == sum(p.nbytes for p in m.parameters()) - m.model.norm.weight.nbytes


def test_refusals(capsys):
    for words, says in ((["--rows", "0"], "--rows is 0"), (["--turns", "-1"], "--turns is -1")):
        with pytest.raises(SystemExit):
            main(words)
        assert says in capsys.readouterr().err


@torch.no_grad()
def test_the_plain_ops_take_the_same_routing():
    """Free to choose, they choose others in some layer, and their logits are several times as far away."""
    m = model(num_hidden_layers=12, num_experts=64, num_experts_per_tok=4, hidden_size=64, tie_word_embeddings=False).eval()
    fill(m)
    for name, p in m.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.mul_(35 / p.shape[-1] ** 0.5)
    cache = m.new_cache(16, 9)
    cache.k.normal_(generator=torch.Generator().manual_seed(1))
    cache.lengths.fill_(8)
    tokens = torch.arange(16)[:, None]
    ours = m(tokens, cache=cache)[:, -1].float()
    chosen = routing_of(m, tokens, cache)

    def distance(experts):
        return ((plain_logits(m, tokens, cache, experts) - ours).norm() / ours.norm()).item()

    near = distance(chosen)
    assert near < 0.08 and distance([]) > 4 * near
