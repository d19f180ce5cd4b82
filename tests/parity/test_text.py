"""The text encoder against one written in torch from the same description."""

import jax
import numpy as np
import pytest

from ldm_jax.models import text

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

VOCAB, WIDTH, LAYERS, LENGTH, HEADS, HEAD_DIM = 31, 48, 3, 10, 4, 8


def encoder():
    nn, inner = torch.nn, HEADS * HEAD_DIM
    layers = [
        nn.ModuleDict(
            {
                "norm_attn": nn.LayerNorm(WIDTH),
                "q": nn.Linear(WIDTH, inner, bias=False),
                "k": nn.Linear(WIDTH, inner, bias=False),
                "v": nn.Linear(WIDTH, inner, bias=False),
                "out": nn.Linear(inner, WIDTH),
                "norm_ff": nn.LayerNorm(WIDTH),
                "ff": nn.Sequential(
                    nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
                ),
            }
        )
        for _ in range(LAYERS)
    ]
    return nn.ModuleDict(
        {
            "token": nn.Embedding(VOCAB, WIDTH),
            "position": nn.Embedding(LENGTH, WIDTH),
            "layers": nn.ModuleList(layers),
            "norm": nn.LayerNorm(WIDTH),
        }
    )


def forward(net, ids, mask):
    x = net["token"](ids) + net["position"].weight[: ids.shape[1]]
    for layer in net["layers"]:
        h = layer["norm_attn"](x)
        q, k, v = (
            layer[name](h).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for name in "qkv"
        )
        keys = None if mask is None else mask[:, None, None, :]
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + layer["out"](h.transpose(1, 2).flatten(2))
        x = x + layer["ff"](layer["norm_ff"](x))
    return net["norm"](x)


def copied(net):
    """The parameters of the torch encoder under our names."""

    def norm(m):
        return {"scale": m.weight.detach().numpy(), "bias": m.bias.detach().numpy()}

    def dense(m):
        kernel = {"kernel": m.weight.detach().numpy().T}
        return kernel if m.bias is None else kernel | {"bias": m.bias.detach().numpy()}

    params = {
        "token": {"embedding": net["token"].weight.detach().numpy()},
        "position": net["position"].weight.detach().numpy(),
        "norm": norm(net["norm"]),
    }
    for i, layer in enumerate(net["layers"]):
        params[f"layer_{i}"] = {
            "norm_attn": norm(layer["norm_attn"]),
            "attn": {name: dense(layer[name]) for name in ("q", "k", "v", "out")},
            "norm_ff": norm(layer["norm_ff"]),
            "ff_in": dense(layer["ff"][0]),
            "ff_out": dense(layer["ff"][2]),
        }
    return {"params": params}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [LENGTH, 7])
def test_embeddings_equal_those_of_torch(masked, tokens):
    torch.manual_seed(0)
    net = encoder()
    for name, p in net.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.2)
    ids = torch.randint(0, VOCAB, (3, tokens))
    mask = torch.arange(tokens) < torch.tensor([[tokens], [4], [1]]) if masked else None
    expected = forward(net, ids, mask).detach().numpy()
    model = text.TextTransformer(
        vocab=VOCAB, width=WIDTH, layers=LAYERS, length=LENGTH, heads=HEADS, head_dim=HEAD_DIM
    )
    params = copied(net)
    ids, mask = (
        jax.numpy.asarray(ids.numpy()),
        None if mask is None else jax.numpy.asarray(mask.numpy()),
    )
    born = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert jax.tree.map(lambda a: a.shape, born) == jax.tree.map(lambda a: a.shape, params)
    y = jax.jit(model.apply)(params, ids, mask)
    np.testing.assert_allclose(y, expected, atol=1e-5)
